#!/bin/bash -l
# Weak scaling of the 40B model on ALCF Aurora: the batch grows with the replicas, 720 nodes and 100 images a
# replica, ten steps each, one after the other on the same nodes; then the table of those that were finished.
#
# The published curve has 1, 2, 5, 7, 10 and 14 replicas (95.5 % from the first to the last).
#
#   qsub -A PROJECT pbs/weak_scaling.sh                  from the top directory of the project
#
# Settings (qsub -v NAME=VALUE,...): REPLICAS (numbers of replicas, by blanks), NODES (of the largest, for the
# environment), RUN_DIR, DATA (a store of aeris.data.convert), VENV, ARCHIVE, FLAGS (more flags of aeris.train).
#PBS -N weak_scaling
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
RUN_DIR="${RUN_DIR:-runs/weak_scaling}"
finished=() preflight=()
for dp in "${replicas[@]}"; do
    python -m launch job --machine alcf-aurora --nodes "$((720 * dp))" --stage "${ARCHIVE:-}" \
        "${preflight[@]}" -- aeris.train 40b --run-dir "$RUN_DIR/dp_$dp" --data.store "${DATA:-era5}" \
        --train.batch "$((100 * dp))" --train.images "$((1000 * dp))" --checkpoint.every-images 1000000 \
        --parallel.dp "$dp" --parallel.wp-y 6 --parallel.wp-x 6 --parallel.pp 20 --parallel.sp 12 \
        "${flags[@]}" || break
    finished+=("$RUN_DIR/dp_$dp")
    preflight=(--no-preflight)
done
: "${finished[0]:?no size was finished}"
exec python -m benchmarks.weak_scaling --collect "${finished[@]}" --csv "$RUN_DIR/weak_scaling.csv"
