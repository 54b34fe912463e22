#!/bin/bash -l
# Weather data into a store, on one node of LUMI-G or a machine like it. One process writes (converting on
# several is not built yet); the statistics are computed by PROCESSES of them. Killed, it goes on when it is
# submitted again.
#
#   sbatch --account=PROJECT --export=ALL,SOURCE=era5.zarr,STORE=era5,FLAGS='--window 30' \
#       launch/slurm/convert.sh
#
# Settings (sbatch --export=ALL,NAME=VALUE,...): SOURCE, STORE, FLAGS (flags of aeris.data.convert, by blanks),
# PROCESSES, VENV.
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
# shellcheck source=launch/slurm/env/lumi.sh
source launch/slurm/env/lumi.sh
read -r -a flags <<<"${FLAGS:?flags of aeris.data.convert, at least --window}"
exec python -m aeris.data.convert "${SOURCE:?NetCDF files or a Zarr directory}" "${STORE:?the new store}" \
    --processes "${PROCESSES:-32}" "${flags[@]}"
