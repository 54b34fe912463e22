#!/bin/bash -l
# Strong scaling of the 1.3B model on LUMI-G or a machine like it: always 160 images a step, shared by 1 to 8
# replicas of 80 nodes, ten steps each, one after the other on the same nodes; then the table of those that were
# finished. The replicas must divide the batch.
#
#   sbatch --account=PROJECT launch/slurm/strong_scaling.sh      from the top directory of the project
#
# Settings (sbatch --export=ALL,NAME=VALUE,...): REPLICAS (numbers of replicas, by blanks), RUN_DIR, DATA (a store
# of aeris.data.convert), VENV, ARCHIVE, FLAGS (more flags of aeris.train).
#SBATCH --job-name=strong_scaling
#SBATCH --partition=standard-g
#SBATCH --nodes=647
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=06:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
# shellcheck source=launch/slurm/env/lumi.sh
source launch/slurm/env/lumi.sh
read -r -a flags <<<"${FLAGS:-}"
read -r -a replicas <<<"${REPLICAS:-1 2 4 8}"
RUN_DIR="${RUN_DIR:-runs/strong_scaling}"
finished=() preflight=()
for dp in "${replicas[@]}"; do
    python -m launch job --machine lumi --nodes "$((80 * dp))" --stage "${ARCHIVE:-}" \
        "${preflight[@]}" -- aeris.train 1.3b-6h --run-dir "$RUN_DIR/dp_$dp" --data.store "${DATA:-era5}" \
        --train.batch 160 --train.images 1600 --checkpoint.every-images 1000000 \
        --parallel.dp "$dp" --parallel.wp-y 4 --parallel.wp-x 4 --parallel.pp 10 --parallel.sp 4 \
        "${flags[@]}" || break
    finished+=("$RUN_DIR/dp_$dp")
    preflight=(--no-preflight)
done
: "${finished[0]:?no size was finished}"
exec python -m benchmarks.strong_scaling --collect "${finished[@]}" --csv "$RUN_DIR/strong_scaling.csv"
