#!/bin/bash -l
# 13B parameters on 2,560 nodes of ALCF Aurora, 30,720 ranks: 10 replicas of 256 nodes, each 4 x 4 ranks for
# windows x 16 stages x 12 ranks for the tokens of a window (stages inferred from published node counts).
#
# The job asks for 1 % more nodes: those that fail the preflight, or later, are replaced by them.
#
#   qsub -A PROJECT pbs/train_13b.sh                  from the top directory of the project
#   python -m launch submit 13b --nodes 2560 --account PROJECT --dry-run
#
# The second checks everything first and prints both command lines; without --dry-run it submits.
#
# Settings (qsub -v NAME=VALUE,...): NODES and DP together, RUN_DIR, DATA (a store of aeris.data.convert), VENV,
# ARCHIVE (an environment of `launch pack`, put on every node), FLAGS (more flags of aeris.train, by blanks),
# CHAIN (the script of the next job; empty: none).
# A replica needs 256 nodes, and DP divides the batch of 1400.
#PBS -N train_13b
#PBS -q prod
#PBS -l select=2586
#PBS -l walltime=24:00:00
#PBS -l filesystems=flare
#PBS -l place=scatter
#PBS -k doe
#PBS -j oe
set -euo pipefail
cd "${PBS_O_WORKDIR:-.}"
export NODES="${NODES:-2560}"
# shellcheck source=pbs/env/alcf-aurora.sh
source pbs/env/alcf-aurora.sh
read -r -a flags <<<"${FLAGS:-}"
exec python -m launch job --machine alcf-aurora --nodes "$NODES" \
    --resubmit "${CHAIN-pbs/train_13b.sh}" --stage "${ARCHIVE:-}" -- \
    aeris.train 13b --run-dir "${RUN_DIR:-runs/13b}" --data.store "${DATA:-era5}" \
    --checkpoint.every-minutes 15 --parallel.dp "${DP:-10}" --parallel.wp-y 4 --parallel.wp-x 4 \
    --parallel.pp 16 --parallel.sp 12 "${flags[@]}"
