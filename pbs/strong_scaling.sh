#!/bin/bash -l
# Strong scaling of the 40B model on ALCF Aurora: always 1,400 images a step, shared by 1 to 14 replicas of 720
# nodes, ten steps each, one after the other on the same nodes; then the table of those that were finished.
#
# The replicas must divide the batch. The published strong scaling is 81.6 %, of what is not said.
#
#   qsub -A PROJECT pbs/strong_scaling.sh                  from the top directory of the project
#
# Settings (qsub -v NAME=VALUE,...): REPLICAS (numbers of replicas, by blanks), NODES (of the largest, for the
# environment), RUN_DIR, DATA (a store of aeris.data.convert), VENV, ARCHIVE, FLAGS (more flags of aeris.train).
#PBS -N strong_scaling
#PBS -q prod
#PBS -l select=10181
#PBS -l walltime=06:00:00
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
read -r -a replicas <<<"${REPLICAS:-1 2 5 7 10 14}"
RUN_DIR="${RUN_DIR:-runs/strong_scaling}"
finished=() preflight=()
for dp in "${replicas[@]}"; do
    python -m launch job --machine alcf-aurora --nodes "$((720 * dp))" --stage "${ARCHIVE:-}" \
        "${preflight[@]}" -- aeris.train 40b --run-dir "$RUN_DIR/dp_$dp" --data.store "${DATA:-era5}" \
        --train.batch 1400 --train.images 14000 --checkpoint.every-images 1000000 \
        --parallel.dp "$dp" --parallel.wp-y 6 --parallel.wp-x 6 --parallel.pp 20 --parallel.sp 12 \
        "${flags[@]}" || break
    finished+=("$RUN_DIR/dp_$dp")
    preflight=(--no-preflight)
done
: "${finished[0]:?no size was finished}"
exec python -m benchmarks.strong_scaling --collect "${finished[@]}" --csv "$RUN_DIR/strong_scaling.csv"
