#!/bin/bash
# Rendered by `megatron-opd launch slurm`. Each start goes on from the newest checkpoint in run_dir.
#   nodes 0 to 47: the models, ranks 0 to 383
#   nodes 48 to 59: SGLang servers that draw the rollouts, 8 a node
#   nodes 60 to 63: SGLang servers that are the teacher, 2 a node
#SBATCH --job-name=30b-a3b-to-4b-sglang
#SBATCH --time=48:00:00
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=USR1@900
#SBATCH --requeue
#SBATCH --exclusive
#SBATCH --mem=0

config=(examples/slurm/sglang.yaml)
run_dir=runs/30b-a3b-to-4b-sglang
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

# SGLang servers, and the key that they ask for.
SGLANG_API_KEY=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
export SGLANG_API_KEY
servers=() urls=()
urls() { # of the servers on $2 nodes from $1 on, $4 of them on each, ports from $3 on
    local list='' node number
    for node in "${nodes[@]:$1:$2}"; do
        for ((number = 0; number < $4; number++)); do
            list+=,http://$(address "$node"):$((port + $3 + number))
        done
    done
    echo "[${list:1}]"
}
listen() { # whether the servers at all URLs of the list $1 do
    local url
    for url in ${1//[][,]/ }; do
        url=${url#http://}
        (exec 3<> "/dev/tcp/${url%:*}/${url##*:}") 2> /dev/null || return 1
    done
}
srun --nodes=12 --ntasks=12 --ntasks-per-node=1 --relative=48 --cpus-per-task=96 \
    --kill-on-bad-exit=1 \
    --container-image=/images/sglang.sqsh --container-workdir="$PWD" \
    --container-mounts="$PWD:$PWD",/data:/data \
    megatron-opd serve --port=$((port + 1)) -- rollout "${config[@]}" &
servers+=($!)
urls+=(rollout.sglang.urls="$(urls 48 12 1 8)")
urls+=(rollout.sglang.python=null rollout.sglang.servers=1 rollout.sglang.host=127.0.0.1 'rollout.sglang.gpus=[]' 'rollout.sglang.arguments=[]')

srun --nodes=4 --ntasks=4 --ntasks-per-node=1 --relative=60 --cpus-per-task=96 \
    --kill-on-bad-exit=1 \
    --container-image=/images/sglang.sqsh --container-workdir="$PWD" \
    --container-mounts="$PWD:$PWD",/data:/data \
    megatron-opd serve --port=$((port + 9)) -- teacher "${config[@]}" &
servers+=($!)
urls+=(teacher.sglang.urls="$(urls 60 4 9 2)")
urls+=(teacher.sglang.python=null teacher.sglang.servers=1 teacher.sglang.host=127.0.0.1 'teacher.sglang.gpus=[]' 'teacher.sglang.arguments=[]')
until listen "$(urls 60 4 9 2)" || ! kill -0 $! 2> /dev/null; do sleep 2; done

# The ranks. `exec`: signals reach them, not a shell.
# shellcheck disable=SC2016
srun --nodes=48 --ntasks=384 --ntasks-per-node=8 --relative=0 --cpus-per-task=12 \
    --kill-on-bad-exit=1 \
    --container-image=/images/megatron-opd.sqsh --container-workdir="$PWD" \
    --container-mounts="$PWD:$PWD",/data:/data \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"' rank \
    megatron-opd train -- "${config[@]}" "${urls[@]}" &
run=$!
wait -n # for the run, or for servers that end before it
if kill -0 "$run" 2> /dev/null; then
    echo "servers have ended before the run, which has 900 s to save: see the logs in $run_dir/servers" >&2
    kill -USR1 "$run"
    for ((left = 900; left > 0; left--)); do
        kill -0 "$run" 2> /dev/null || break
        sleep 1
    done
    kill "$run" 2> /dev/null
fi
wait "$run"
code=$?
kill "${servers[@]}" 2> /dev/null
wait

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
