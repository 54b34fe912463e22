#!/bin/bash -l
# 40B parameters on 10,080 nodes of ALCF Aurora, 120,960 ranks: 14 replicas of the published 720 nodes, each
# 6 x 6 ranks for windows x 20 stages x 12 ranks for the tokens of a window.
#
# The job asks for 1 % more nodes: those that fail the preflight, or later, are replaced by them.
#
#   qsub -A PROJECT pbs/train_10080nodes.sh                  from the top directory of the project
#   python -m launch submit 40b --nodes 10080 --account PROJECT --dry-run
#
# The second checks everything first and prints both command lines; without --dry-run it submits.
#
# Settings (qsub -v NAME=VALUE,...): NODES and DP together, RUN_DIR, DATA (a store of aeris.data.convert), VENV,
# ARCHIVE (an environment of `launch pack`, put on every node), FLAGS (more flags of aeris.train, by blanks),
# CHAIN (the script of the next job; empty: none).
# A replica needs 720 nodes, and DP divides the batch of 1400.
#PBS -N train_40b
#PBS -q prod
#PBS -l select=10181
#PBS -l walltime=24:00:00
#PBS -l filesystems=flare
#PBS -l place=scatter
#PBS -k doe
#PBS -j oe
set -euo pipefail
cd "${PBS_O_WORKDIR:-.}"
export NODES="${NODES:-10080}"
# shellcheck source=pbs/env/alcf-aurora.sh
source pbs/env/alcf-aurora.sh
read -r -a flags <<<"${FLAGS:-}"
exec python -m launch job --machine alcf-aurora --nodes "$NODES" \
    --resubmit "${CHAIN-pbs/train_10080nodes.sh}" --stage "${ARCHIVE:-}" -- \
    aeris.train 40b --run-dir "${RUN_DIR:-runs/40b}" --data.store "${DATA:-era5}" \
    --checkpoint.every-minutes 15 --parallel.dp "${DP:-14}" --parallel.wp-y 6 --parallel.wp-x 6 \
    --parallel.pp 20 --parallel.sp 12 "${flags[@]}"
