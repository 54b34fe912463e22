#!/bin/bash -l
# One node of ALCF Aurora, 12 ranks: to try data, settings and machine before a large job. The layout is chosen.
#
# The 1.3B model fits when blocks are computed again in the backward pass (108 GiB over 12 tiles of 64, by
# `python -m aeris.train 1.3b-6h --model.checkpointing block --dry-run`). Its steps of 20 images take minutes
# here; FLAGS='--train.batch 4' for a look, PRESET=tiny,DATA=sample for a minute.
#
#   qsub -A PROJECT pbs/train_1node.sh                  from the top directory of the project
#   qsub -A PROJECT -v PRESET=tiny,DATA=sample pbs/train_1node.sh
#
# Settings (qsub -v NAME=VALUE,...): PRESET, RUN_DIR, DATA (a store of aeris.data.convert), VENV, ARCHIVE (an
# environment of `launch pack`, put on the node), FLAGS (more flags of aeris.train, by blanks), NODES, CHAIN.
#PBS -N train_1node
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
read -r -a flags <<<"${FLAGS:-}"
exec python -m launch job --machine alcf-aurora --nodes "$NODES" \
    --resubmit "${CHAIN:-}" --stage "${ARCHIVE:-}" -- \
    aeris.train "${PRESET:-1.3b-6h}" --run-dir "${RUN_DIR:-runs/${PRESET:-1.3b-6h}}" \
    --data.store "${DATA:-era5}" --checkpoint.every-minutes 15 --model.checkpointing block "${flags[@]}"
