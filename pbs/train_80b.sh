#!/bin/bash -l
# 80B parameters on 8,320 nodes of ALCF Aurora, 99,840 ranks: 5 replicas of 1,664 nodes, each 8 x 8 ranks for
# windows x 26 stages x 12 ranks for the tokens of a window (inferred from published node counts).
#
# The job asks for 1 % more nodes: those that fail the preflight, or later, are replaced by them.
#
#   qsub -A PROJECT pbs/train_80b.sh                  from the top directory of the project
#   python -m launch submit 80b --nodes 8320 --account PROJECT --dry-run
#
# The second checks everything first and prints both command lines; without --dry-run it submits.
#
# Settings (qsub -v NAME=VALUE,...): NODES and DP together, RUN_DIR, DATA (a store of aeris.data.convert), VENV,
# ARCHIVE (an environment of `launch pack`, put on every node), FLAGS (more flags of aeris.train, by blanks),
# CHAIN (the script of the next job; empty: none).
# A replica needs 1,664 nodes, and DP divides the batch of 1400.
#PBS -N train_80b
#PBS -q prod
#PBS -l select=8404
#PBS -l walltime=24:00:00
#PBS -l filesystems=flare
#PBS -l place=scatter
#PBS -k doe
#PBS -j oe
set -euo pipefail
cd "${PBS_O_WORKDIR:-.}"
export NODES="${NODES:-8320}"
# shellcheck source=pbs/env/alcf-aurora.sh
source pbs/env/alcf-aurora.sh
read -r -a flags <<<"${FLAGS:-}"
exec python -m launch job --machine alcf-aurora --nodes "$NODES" \
    --resubmit "${CHAIN-pbs/train_80b.sh}" --stage "${ARCHIVE:-}" -- \
    aeris.train 80b --run-dir "${RUN_DIR:-runs/80b}" --data.store "${DATA:-era5}" \
    --checkpoint.every-minutes 15 --parallel.dp "${DP:-5}" --parallel.wp-y 8 --parallel.wp-x 8 \
    --parallel.pp 26 --parallel.sp 12 "${flags[@]}"
