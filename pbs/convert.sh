#!/bin/bash -l
# Weather data into a store, on one node of ALCF Aurora. One process writes (converting on several is not built
# yet); the statistics are computed by PROCESSES of them. Killed, it goes on when it is submitted again.
#
#   qsub -A PROJECT -v SOURCE=era5.zarr,STORE=era5,FLAGS='--window 30 --train-period 1979 2018' pbs/convert.sh
#
# Settings (qsub -v NAME=VALUE,...): SOURCE, STORE, FLAGS (flags of aeris.data.convert, by blanks),
# PROCESSES, VENV.
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
export NODES=1
# shellcheck source=pbs/env/alcf-aurora.sh
source pbs/env/alcf-aurora.sh
read -r -a flags <<<"${FLAGS:?flags of aeris.data.convert, at least --window}"
exec python -m aeris.data.convert "${SOURCE:?NetCDF files or a Zarr directory}" "${STORE:?the new store}" \
    --processes "${PROCESSES:-32}" "${flags[@]}"
