#!/bin/bash
# Rendered by `megatron-opd launch slurm`. Each start goes on from the newest checkpoint in run_dir.
#   node 0: the models, ranks 0 to 7
#SBATCH --job-name=30b-a3b-to-4b
#SBATCH --time=24:00:00
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
#SBATCH --requeue

config=(examples/plans/qwen3-30b-a3b-to-4b.yaml parallel.data=2)
run_dir=runs/30b-a3b-to-4b
source .venv/bin/activate
set -u

# Caches on the disks of the nodes, kept from job to job.
caches=/tmp/megatron-opd-$SLURM_JOB_USER
export TRITON_CACHE_DIR=$caches/triton TORCHINDUCTOR_CACHE_DIR=$caches/inductor HF_HOME=$caches/huggingface
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# 16 ports that another job has only if its number is as far off as a multiple of 900.
port=$((15000 + SLURM_JOB_ID % 900 * 16))
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address() { scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'; }
MASTER_ADDR=$(address "${nodes[0]}")
export MASTER_ADDR MASTER_PORT=$port

# The first rank that ends leaves its exit code here: srun tells that of ranks that it has killed itself.
mkdir -p "$run_dir"
export MEGATRON_OPD_EXIT_FILE=$run_dir/slurm-exit-$SLURM_JOB_ID
rm -f "$MEGATRON_OPD_EXIT_FILE"

# The newest checkpoint: to stop without another one counts as a failure.
newest() { readlink "$run_dir/checkpoints/latest" || echo none; }
at_start=$(newest)

# The ranks. `exec`: signals reach them, not a shell.
# shellcheck disable=SC2016
srun --nodes=1 --ntasks=8 --ntasks-per-node=8 --relative=0 --cpus-per-task=12 \
    --kill-on-bad-exit=1 \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"' rank \
    megatron-opd train -- "${config[@]}" &
run=$!
wait "$run"
code=$?

if [ -s "$MEGATRON_OPD_EXIT_FILE" ]; then code=$(< "$MEGATRON_OPD_EXIT_FILE"); fi
rm -f "$MEGATRON_OPD_EXIT_FILE"
failures=$run_dir/slurm-failures-$SLURM_JOB_ID
again() {
    echo "$1: job $SLURM_JOB_ID is queued again" >&2
    scontrol requeue "$SLURM_JOB_ID"
}
retry() { # 2 times at most from the same checkpoint
    local checkpoint
    checkpoint=$(newest)
    echo "$checkpoint" >> "$failures"
    if [ "$(grep -cxF "$checkpoint" "$failures")" -le 2 ]; then
        again "$1"
    else
        echo "$1, from checkpoint $checkpoint as before: job $SLURM_JOB_ID is not queued again" >&2
    fi
}
case $code in
    0) rm -f "$failures" ;;
    2) echo "a mistake to mend: job $SLURM_JOB_ID is not queued again" >&2 ;;
    75) if [ "$(newest)" != "$at_start" ]; then again "saved"; else retry "stopped with nothing new saved"; fi ;;
    *) retry "exit code $code" ;; # a node, a GPU or the network, mostly
esac
exit "$code"
