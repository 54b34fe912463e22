#!/bin/bash -l
# One node of LUMI-G or a machine like it, 8 ranks: to try data, settings and machine before a large job. The
# layout is chosen.
#
# The 1.3B model fits when blocks are computed again in the backward pass (108 GiB over 8 devices of 64, by
# `python -m aeris.train 1.3b-6h --model.checkpointing block --dry-run`). Its steps of 20 images take minutes
# here; FLAGS='--train.batch 4' for a look, PRESET=tiny,DATA=sample for a minute.
#
#   sbatch --account=PROJECT launch/slurm/train_1node.sh      from the top directory of the project
#   sbatch --account=PROJECT --export=ALL,PRESET=tiny,DATA=sample launch/slurm/train_1node.sh
#
# Settings (sbatch --export=ALL,NAME=VALUE,...): PRESET, RUN_DIR, DATA (a store of aeris.data.convert), VENV,
# ARCHIVE (an environment of `launch pack`, put on the node), FLAGS (more flags of aeris.train, by blanks), NODES,
# CHAIN.
#SBATCH --job-name=train_1node
#SBATCH --partition=dev-g
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --no-kill
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@900
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export NODES="${NODES:-1}"
# shellcheck source=launch/slurm/env/lumi.sh
source launch/slurm/env/lumi.sh
read -r -a flags <<<"${FLAGS:-}"
exec python -m launch job --machine lumi --nodes "$NODES" \
    --resubmit "${CHAIN:-}" --stage "${ARCHIVE:-}" -- \
    aeris.train "${PRESET:-1.3b-6h}" --run-dir "${RUN_DIR:-runs/${PRESET:-1.3b-6h}}" \
    --data.store "${DATA:-era5}" --checkpoint.every-minutes 15 --model.checkpointing block "${flags[@]}"
