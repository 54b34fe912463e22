"""Loss weights and the weighted mean, against sums written out point by point."""

import numpy as np
import pytest
import torch

from aeris.data.variables import aeris_channels
from aeris.diffusion.loss import loss_weights, weighted_mse
from swipe.windows import WindowGrid, WindowShard

NAMES = ("t2m", "z500", "z850", "sst")
LATITUDE_DEG = np.array([75.0, 45.0, 15.0, -15.0, -45.0, -75.0])
COLS = 8
GRID = WindowGrid(6, COLS, 2)


def tokens(windows: tuple[tuple[int, int], ...] | None = None) -> torch.Tensor:
    shard = WindowShard.full(GRID) if windows is None else WindowShard(GRID, windows)
    return torch.from_numpy(shard.token_index())


def mask() -> np.ndarray:
    mask_CYX = np.ones((4, 6, COLS), dtype=bool)
    mask_CYX[3, 1:4, 2:7] = False
    return mask_CYX


def written_out(mask_CYX: np.ndarray) -> np.ndarray:
    """Weights [C, Y, X], mean 1 over the valid points, from the formulas of the paper."""
    kappa = np.array([1.0, 500 / 1350, 850 / 1350, 0.1])
    alpha = np.cos(np.deg2rad(LATITUDE_DEG)) + 0.01
    w = kappa[:, None, None] * alpha[None, :, None] * mask_CYX
    return w / w[mask_CYX].mean()


def test_weights_are_the_product_at_every_token() -> None:
    mask_CYX = mask()
    order = tokens().flatten().flip(0).reshape(12, 4)  # any order of tokens will do
    got = loss_weights(NAMES, LATITUDE_DEG, order, COLS, channel_scheme="pressure", mask_CYX=mask_CYX)
    expected = (
        written_out(mask_CYX) * mask_CYX.size / mask_CYX.sum()
    )  # mean 1 over all points, hidden ones as 0
    for window, token, channel in [(0, 0, 0), (3, 1, 1), (7, 2, 3), (11, 3, 2)]:
        row, col = divmod(int(order[window, token]), COLS)
        assert got[window, token, channel].item() == pytest.approx(expected[channel, row, col], rel=1e-6)
    assert got.dtype == torch.float32
    assert got.mean().item() == pytest.approx(1.0, rel=1e-6)
    assert int((got == 0).sum()) == 15


def test_loss_is_the_weighted_mean_over_valid_points() -> None:
    mask_CYX = mask()
    weight_NTC = loss_weights(
        NAMES, LATITUDE_DEG, tokens(), COLS, channel_scheme="pressure", mask_CYX=mask_CYX
    )
    prediction, target = torch.randn(2, 3, 12, 4, 4)
    loss, loss_B = weighted_mse(prediction, target, weight_NTC)
    place = tokens().flatten().numpy()
    for sample in range(3):
        square = np.empty((4, 6 * COLS))
        square[:, place] = (prediction - target)[sample].square().reshape(-1, 4).T.numpy()
        expected = (written_out(mask_CYX).reshape(4, -1) * square).sum() / mask_CYX.sum()
        assert loss_B[sample].item() == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(loss_B.mean().item())


def test_error_one_everywhere_gives_one() -> None:
    for scheme in ("uniform", "pressure"):
        weight_NTC = loss_weights(NAMES, LATITUDE_DEG, tokens(), COLS, channel_scheme=scheme, mask_CYX=mask())
        loss, _ = weighted_mse(torch.ones(2, 12, 4, 4), torch.zeros(2, 12, 4, 4), weight_NTC)
        assert loss.item() == pytest.approx(1.0, rel=1e-6)


def test_hidden_points_do_not_count() -> None:
    weight_NTC = loss_weights(NAMES, LATITUDE_DEG, tokens(), COLS, mask_CYX=mask())
    target = torch.randn(1, 12, 4, 4)
    wild = torch.where(weight_NTC == 0, 1e6, target)
    assert weighted_mse(wild, target, weight_NTC)[0].item() == 0.0


def test_shards_average_to_the_whole() -> None:
    """Each of two ranks sees half of the windows; the mean of their losses is the loss of the grid."""
    halves = [tuple((wy, wx) for wy in range(3) for wx in range(rank, 4, 2)) for rank in range(2)]
    error = torch.randn(1, 4, 6 * COLS)
    losses = []
    for windows in (None, *halves):
        place = tokens(windows)
        weight_NTC = loss_weights(
            NAMES, LATITUDE_DEG, place, COLS, channel_scheme="pressure", mask_CYX=mask()
        )
        error_BNTC = error[:, :, place].permute(0, 2, 3, 1)
        losses.append(weighted_mse(error_BNTC, torch.zeros_like(error_BNTC), weight_NTC)[0].item())
    assert (losses[1] + losses[2]) / 2 == pytest.approx(losses[0], rel=1e-6)


def test_published_channel_weights() -> None:
    """t2m 1 / 6.3, 50 and 1000 hPa 0.00132 and 0.02635 of the sum over the 69 channels."""
    names = aeris_channels(sst=False)
    weight_NTC = loss_weights(
        names, LATITUDE_DEG, tokens(), COLS, channel_scheme="pressure", weight_latitudes=False
    )
    share_C = weight_NTC[0, 0] / weight_NTC[0, 0].sum()
    for name, share in [("t2m", 0.1587), ("u10", 0.01587), ("z50", 0.00132), ("q1000", 0.02635)]:
        assert share_C[names.index(name)].item() == pytest.approx(share, abs=6e-6 if share < 0.1 else 6e-5)


def test_equal_weights_are_one() -> None:
    weight_NTC = loss_weights(NAMES, LATITUDE_DEG, tokens(), COLS, weight_latitudes=False)
    torch.testing.assert_close(weight_NTC, torch.ones(12, 4, 4))


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="6 x 4"):
        loss_weights(NAMES, LATITUDE_DEG, tokens(), 4)
    with pytest.raises(ValueError, match=r"mask has shape \(4, 6, 7\)"):
        loss_weights(NAMES, LATITUDE_DEG, tokens(), COLS, mask_CYX=mask()[:, :, 1:])
    with pytest.raises(ValueError, match="hides the whole grid"):
        loss_weights(NAMES, LATITUDE_DEG, tokens(), COLS, mask_CYX=np.zeros((4, 6, COLS), dtype=bool))
