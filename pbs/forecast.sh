#!/bin/bash -l
# Ensemble forecasts with a trained run on ALCF Aurora. Killed, it goes on when it is submitted again.
#
#   qsub -A PROJECT -v RUN_DIR=runs/1.3b-24h,OUT=forecast.zarr,FLAGS='--init 2020-06-01T00 --lead-h 240' \
#       pbs/forecast.sh
#
# Settings (qsub -v NAME=VALUE,...): RUN_DIR, OUT, FLAGS (flags of aeris.forecast, by blanks; --init and --lead-h
# are needed, --members is worth a thought), NODES (more share members and init times), VENV, ARCHIVE. It
# stops 180 s before its time is up, with everything written.
#PBS -N forecast
#PBS -q debug
#PBS -l select=1
#PBS -l walltime=01:00:00
#PBS -l filesystems=flare
#PBS -l place=scatter
#PBS -k doe
#PBS -j oe
set -euo pipefail
cd "${PBS_O_WORKDIR:-.}"
export NODES="${NODES:-1}"
# shellcheck source=pbs/env/alcf-aurora.sh
source pbs/env/alcf-aurora.sh
read -r -a flags <<<"${FLAGS:?flags of aeris.forecast, at least --init and --lead-h}"
exec python -m launch job --machine alcf-aurora --nodes "$NODES" --stage "${ARCHIVE:-}" \
    --margin-s 180 -- \
    aeris.forecast "${RUN_DIR:?the run directory}" --out "${OUT:?where to}" --run-dir "$OUT.job" "${flags[@]}"
