#!/bin/bash -l
# Ensemble forecasts with a trained run on LUMI-G or a machine like it. Killed, it goes on when it is submitted
# again.
#
#   sbatch --account=PROJECT --export=ALL,RUN_DIR=runs/1.3b-24h,OUT=forecast.zarr,FLAGS='--init 2020-06-01T00 \
#       --lead-h 240' launch/slurm/forecast.sh
#
# Settings (sbatch --export=ALL,NAME=VALUE,...): RUN_DIR, OUT, FLAGS (flags of aeris.forecast, by blanks; --init
# and --lead-h are needed, --members is worth a thought), NODES (more share members and init times), VENV, ARCHIVE.
# It stops 180 s before its time is up, with everything written.
#SBATCH --job-name=forecast
#SBATCH --partition=dev-g
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=01:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export NODES="${NODES:-1}"
# shellcheck source=launch/slurm/env/lumi.sh
source launch/slurm/env/lumi.sh
read -r -a flags <<<"${FLAGS:?flags of aeris.forecast, at least --init and --lead-h}"
exec python -m launch job --machine lumi --nodes "$NODES" --stage "${ARCHIVE:-}" \
    --margin-s 180 -- \
    aeris.forecast "${RUN_DIR:?the run directory}" --out "${OUT:?where to}" --run-dir "$OUT.job" "${flags[@]}"
