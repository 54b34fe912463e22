#!/bin/bash -l
# 1.3B parameters on 160 nodes of ALCF Aurora, 1,920 ranks, as published: 4 x 4 ranks for windows x 10 stages x
# 12 ranks for the tokens of a window.
#
# 160 nodes go to debug-scaling only: one job of one hour a user, so it does not submit its successor. In prod
# the same run takes 320 nodes as two replicas: python -m launch submit 1.3b-24h --nodes 320.
#
#   qsub -A PROJECT pbs/train_1.3b_160nodes.sh                  from the top directory of the project
#   python -m launch submit 1.3b-24h --nodes 160 --account PROJECT --dry-run
#
# The second checks everything first and prints both command lines; without --dry-run it submits.
#
# Settings (qsub -v NAME=VALUE,...): NODES and DP together, RUN_DIR, DATA (a store of aeris.data.convert), VENV,
# ARCHIVE (an environment of `launch pack`, put on every node), FLAGS (more flags of aeris.train, by blanks),
# CHAIN (the script of the next job; empty: none).
# Also PRESET: 1.3b-24h or 1.3b-6h. A replica needs 160 nodes, and DP divides the batch of 20.
#PBS -N train_1.3b
#PBS -q debug-scaling
#PBS -l select=162
#PBS -l walltime=01:00:00
#PBS -l filesystems=flare
#PBS -l place=scatter
#PBS -k doe
#PBS -j oe
set -euo pipefail
cd "${PBS_O_WORKDIR:-.}"
export NODES="${NODES:-160}"
# shellcheck source=pbs/env/alcf-aurora.sh
source pbs/env/alcf-aurora.sh
read -r -a flags <<<"${FLAGS:-}"
exec python -m launch job --machine alcf-aurora --nodes "$NODES" \
    --resubmit "${CHAIN:-}" --stage "${ARCHIVE:-}" -- \
    aeris.train "${PRESET:-1.3b-24h}" --run-dir "${RUN_DIR:-runs/${PRESET:-1.3b-24h}}" \
    --data.store "${DATA:-era5}" --checkpoint.every-minutes 15 \
    --parallel.dp "${DP:-1}" --parallel.wp-y 4 --parallel.wp-x 4 --parallel.pp 10 --parallel.sp 12 "${flags[@]}"
