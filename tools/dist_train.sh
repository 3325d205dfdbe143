#!/usr/bin/env bash
# tools/dist_train.sh CONFIG GPUS [options of train.py]
# Several nodes: set NNODES, NODE_RANK, MASTER_ADDR and PORT, and run it on each.
# MAX_RESTARTS=N: resume from the latest checkpoint in the work dir, and again when a process dies, up to N times.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# -ge 2 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }

addr=${MASTER_ADDR:-127.0.0.1}
port=${PORT:-29500}
if [ "${MAX_RESTARTS:-0}" -gt 0 ]; then
    # A store of its own for each start: in a shared one, processes could read the addresses of those that died
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # c10d: the nodes restart together; it numbers them itself
    nodes=(--max_restarts="$MAX_RESTARTS" --rdzv_backend=c10d --rdzv_endpoint="$addr:$port")
    resume=(--resume)
else
    nodes=(--node_rank="${NODE_RANK:-0}" --master_addr="$addr" --master_port="$port")
    resume=()
fi

exec python -m torch.distributed.run --nnodes="${NNODES:-1}" "${nodes[@]}" --nproc_per_node="$2" \
    "$here/train.py" "$1" ${resume[@]+"${resume[@]}"} --launcher pytorch "${@:3}"
