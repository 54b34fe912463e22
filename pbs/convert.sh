#!/bin/bash -l
# Weather data into a store, on nodes of ALCF Aurora that share the work. Killed, it goes on when it is submitted
# again, on as many nodes as you like; ended by the system, it is started again in the same job.
#
#   mkdir era5.partial && lfs setstripe -c -1 -S 16M era5.partial   # `--dry-run` says which stripes
#   qsub -A PROJECT -l select=8 -v NODES=8,SOURCE=era5.zarr,STORE=era5,FLAGS='--window 30 --train-period 1979 2018' \
#       pbs/convert.sh
#
# Settings (qsub -v NAME=VALUE,...): SOURCE, STORE, FLAGS (flags of aeris.data.convert, by blanks), NODES,
# PROCESSES (on each node; --dry-run says what memory one needs), VENV, ARCHIVE.
#PBS -N convert
#PBS -q capacity
#PBS -l select=1
#PBS -l walltime=24:00:00
#PBS -l filesystems=flare
#PBS -l place=scatter
#PBS -k doe
#PBS -j oe
set -euo pipefail
cd "${PBS_O_WORKDIR:-.}"
export NODES="${NODES:-1}"
# shellcheck source=pbs/env/alcf-aurora.sh
source pbs/env/alcf-aurora.sh
# Processes work side by side: none needs threads of its own.
export OMP_NUM_THREADS=1
read -r -a flags <<<"${FLAGS:?flags of aeris.data.convert, at least --window}"
exec python -m launch job --machine alcf-aurora --nodes "$NODES" --ranks-per-node 1 --no-preflight \
    --run-dir "${STORE:?the new store}.job" --stage "${ARCHIVE:-}" -- \
    aeris.data.convert "${SOURCE:?files or a directory of weather data}" "$STORE" \
    --processes "${PROCESSES:-64}" "${flags[@]}"
