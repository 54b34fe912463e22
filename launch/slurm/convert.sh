#!/bin/bash -l
# Weather data into a store, on nodes of LUMI-G or a machine like it that share the work. Killed, it goes on when
# it is submitted again, on as many nodes as you like; ended by the system, it is started again in the same job.
#
#   mkdir era5.partial && lfs setstripe -c -1 -S 16M era5.partial   # `--dry-run` says which stripes
#   sbatch --account=PROJECT --nodes=8 --export=ALL,NODES=8,SOURCE=era5.zarr,STORE=era5,FLAGS='--window 30' \
#       launch/slurm/convert.sh
#
# Settings (sbatch --export=ALL,NAME=VALUE,...): SOURCE, STORE, FLAGS (flags of aeris.data.convert, by blanks),
# NODES, PROCESSES (on each node; --dry-run says what memory one needs), VENV, ARCHIVE.
#SBATCH --job-name=convert
#SBATCH --partition=small-g
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export NODES="${NODES:-1}"
# shellcheck source=launch/slurm/env/lumi.sh
source launch/slurm/env/lumi.sh
# Processes work side by side: none needs threads of its own.
export OMP_NUM_THREADS=1
read -r -a flags <<<"${FLAGS:?flags of aeris.data.convert, at least --window}"
exec python -m launch job --machine lumi --nodes "$NODES" --ranks-per-node 1 --no-preflight \
    --run-dir "${STORE:?the new store}.job" --stage "${ARCHIVE:-}" -- \
    aeris.data.convert "${SOURCE:?files or a directory of weather data}" "$STORE" \
    --processes "${PROCESSES:-48}" "${flags[@]}"
