#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine without a network, from the root of a checkout.
#   scripts/gpu.sh prepare [DIR]        here: DIR (.gpu) and DIR-2 (.gpu-2) with all that such a machine lacks
#   scripts/gpu.sh A                    there, 5 minutes: the GPU tests, the profile of a step
#   scripts/gpu.sh unpack               there, 2 minutes: the GPU tests while what this call has brought is unpacked
#   scripts/gpu.sh photographs          there, 2 minutes: ResNet-50 from files, and what a core reads of them
#   scripts/gpu.sh bench                there, 5 minutes: resnet-bench step, loop and eval of ResNet-20, step of 56, 110 and ResNet-50
#   scripts/gpu.sh boxes SECONDS RUN…   there: detectors on BCCD side by side, each "NAME KEY=VALUE…", then their tests
#   scripts/gpu.sh B SECONDS RUN…       there: whole runs of table 6 side by side, such as resnet-20 plain-56,seed=1
# There: Python 3.12 with torch 2.11 or newer, torchvision, triton, tensorboard, tqdm, matplotlib, scikit-learn, safetensors
# and pytest. DIR holds the rest: wheels of hydra-core, omegaconf, antlr4 and simplejpeg (and faster-coco-eval and pycocotools
# for the detectors' tests), and CIFAR-10 as lossless sheets, six classes in DIR and four in DIR-2, since 64 MiB is the
# most that may travel at once (move results/ aside but for cifar10/unfinished); B needs both parts, from two calls. What is
# unpacked stays there between the calls.
# B stops what has not finished with a checkpoint and packs each run into $OUT/RUN.tar; where results/cifar10/unfinished has
# RUN.tar, it resumes. In names of files `=` and `,` are `-`. DEVICE=cpu tries out all but A.
set -u
T0=$(date +%s)
OUT=${OUT:-/tmp/out}
GPU=$PWD/.gpu
WORK=${WORK:-/tmp/resnet-train}
say() { echo "[$(($(date +%s) - T0)) s] $*"; }

prepare() {
  local dir=${1:-.gpu} shared t
  shared=$(cd "$(dirname "$0")/../../shared/data" && pwd) || exit 2
  mkdir -p "$dir/whl" "$dir-2"
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_28_x86_64 -d "$dir/whl" \
    hydra-core==1.3.8 omegaconf==2.3.1 simplejpeg==1.9.0 faster-coco-eval==1.8.0 pycocotools==2.0.11
  python3 -m pip wheel -q --no-deps -w "$dir/whl" antlr4-python3-runtime==4.9.3
  t=$(mktemp -d) && tar -xzf "$shared/cifar10.tar.gz" -C "$t"
  cp "$shared/cut_sheets.py" "$dir" && cp "$shared/cut_sheets.py" "$dir-2"
  half() { (cd "$t" && find cifar10 -name '*.webp' -o -name '*.txt' | grep -E "/($1)\." | sort | tar -cf - -T -); }
  half 'airplane|automobile|bird|cat|deer|dog' > "$dir/cifar10-1.tar"
  half 'frog|horse|ship|truck' > "$dir-2/cifar10-2.tar"
  mkdir "$t/photos" && tar -xzf "$shared/imagenet_sample.tar.gz" -C "$t/photos"
  (cd "$t/photos" && find . -size -250k -name '*.JPEG' | sort | awk 'NR % 15 == 0' | tar -cf - -T -) > "$dir/photos.tar"
  cp "$shared/bccd.tar.gz" "$dir-2"
  rm -r "$t"
  du -sh "$dir" "$dir-2"
}

install() { # once on a machine; the sheets of a half are cut in the background, a process for each
  export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=4
  export RESNET_TRAIN_DATA=$WORK/cache TORCHINDUCTOR_CACHE_DIR=$WORK/inductor PYTHONPATH=$WORK/site:$PWD
  mkdir -p "$OUT" "$WORK/runs"
  if [ ! -d "$WORK/site" ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$WORK/site" "$GPU"/whl/*.whl || exit 9
  fi
  local half sheet
  for half in "$GPU"/cifar10-1.tar "$GPU-2"/cifar10-2.tar; do
    [ -f "$half" ] && [ ! -e "$WORK/$(basename "$half")" ] || continue
    tar -xf "$half" -C "$WORK" && touch "$WORK/$(basename "$half")"
    for sheet in $(tar -tf "$half" | grep webp); do
      mkdir -p "$WORK/sheets/$sheet/part"
      mv "$WORK/$sheet" "$WORK/${sheet%.webp}.txt" "$WORK/sheets/$sheet/part"
      { python3 "$(dirname "$half")/cut_sheets.py" "$WORK/sheets/$sheet" && mkdir -p "$WORK/$(dirname "$sheet")" &&
        mv "$WORK/sheets/$sheet"/part/* "$WORK/$(dirname "$sheet")/"; } &
    done
  done
  {
    nvidia-smi
    python3 -c 'import torch, torchvision, triton; print(torch.__version__, torchvision.__version__, triton.__version__,
torch.backends.cudnn.version(), torch.cuda.nccl.version(), torch.cuda.get_device_name())'
    nproc --all && free -g
  } > "$OUT/machine.txt" 2>&1
  say "installed: $(tail -4 "$OUT/machine.txt" | head -1)"
}

begin() { # a whole run of table 6 in the background, such as plain-56,seed=1
  local net=${1%%,*} words=() name=${1//[,=]/-}
  [[ $1 == *,* ]] && IFS=, read -ra words <<< "${1#*,}"
  [ -f "results/cifar10/unfinished/$name.tar" ] && [ ! -d "$WORK/runs/$name" ] &&
    tar -xf "results/cifar10/unfinished/$name.tar" -C "$WORK/runs"
  python3 -c 'import sys; from resnet_train.cli import train; sys.exit(train())' arch="${net%-*}" depth="${net#*-}" \
    device="${DEVICE:-cuda}" data.root="$WORK/cifar10" run_dir="$WORK/runs/$name" "${words[@]}" > "$WORK/$name.log" 2>&1 &
  PID[$name]=$!
}

pack() { # what a run leaves, but for TensorBoard's events
  (cd "$WORK/runs" && tar -cf "$OUT/$1.tar" --exclude=tensorboard --exclude=previous.pt "$1")
}

gpu_tests() {
  timeout 200 python3 -m pytest -v --tb=short -n 8 -p no:cacheprovider -p no:benchmark -W default tests/test_gpu.py > "$OUT/tests.txt" 2>&1
  grep -E '(FAILED|ERROR) tests|passed|failed' "$OUT/tests.txt" | cut -c1-300
  say "tests"
}

share_gpu() { # processes side by side under NVIDIA's multi-process service, where it is there and works
  export CUDA_MPS_PIPE_DIRECTORY=$WORK/mps CUDA_MPS_LOG_DIRECTORY=$WORK/mps-log
  mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
  if nvidia-cuda-mps-control -d && timeout 40 python3 -c 'import torch; torch.ones(1, device="cuda").item()'; then
    say "multi-process service"
  else
    echo quit | nvidia-cuda-mps-control
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    say "no multi-process service"
  fi
}

part_a() {
  wait
  gpu_tests
  timeout 110 python3 scripts/gpu_profile.py 20 56 110 out="$OUT/profile.json" > "$OUT/profile.txt" 2>&1
  grep -v ' us ' "$OUT/profile.txt" | tail -110
  say "profile"
}

photographs() { # a dozen of them, many times over: what is read lies in memory
  local photo copy part
  mkdir -p "$WORK/photos" "$WORK/sample" && tar -xf "$GPU/photos.tar" -C "$WORK/sample"
  find "$WORK/sample" -name '*.JPEG' | while read -r photo; do
    for part in train val; do mkdir -p "$WORK/photos/$part/$(basename "$photo" .JPEG)"; done
    for copy in $(seq "${COPIES:-800}"); do ln "$photo" "$WORK/photos/train/$(basename "$photo" .JPEG)/$copy.JPEG"; done
    ln "$photo" "$WORK/photos/val/$(basename "$photo" .JPEG)/0.JPEG"
  done
  say "photographs: $(find "$WORK/photos" -name '*.JPEG' | wc -l)"
  python3 -c 'import sys; from resnet_train.cli import train; sys.exit(train())' data=imagenet data.root="$WORK/photos" depth=50 \
    device="${DEVICE:-cuda}" iterations=120 log_every=20 eval_every=120 run_dir="$WORK/runs/photographs" "$@" > "$OUT/photographs.txt" 2>&1
  tail -30 "$OUT/photographs.txt" | cut -c1-300
  cp "$WORK/runs/photographs/"{metrics.jsonl,environment.json} "$OUT"
  say "ResNet-50"
  timeout 60 python3 -c 'import sys; from resnet_train.cli import bench; sys.exit(bench())' loader data=imagenet \
    data.root="$WORK/photos" rounds=2 seconds=1 device="${DEVICE:-cuda}" out="$OUT/loader.json"
  say "loader"
}

bench() {
  local words
  for words in "step depth=20" "loop depth=20" "eval depth=20" "step depth=56" "step depth=110" "step data=imagenet depth=50 batch_size=256"; do
    timeout 120 python3 -c 'import sys; from resnet_train.cli import bench; sys.exit(bench())' $words rounds=3 seconds=1 \
      device="${DEVICE:-cuda}" out="$OUT/$(echo "$words" | tr ' =' '--').json"
    say "$words"
  done
}

detector() { # resnet-detect WORD…
  python3 -c 'import sys; from resnet_train.cli import detect; sys.exit(detect())' "$@" device="${DEVICE:-cuda}"
}

boxes() { # chosen by val, trained on train; whose name begins with final: trained on trainval, and tested in every way
  local limit=$1 spec name words last scales
  shift
  mkdir -p "$WORK/bccd" && tar -xzf "$GPU-2/bccd.tar.gz" -C "$WORK/bccd" --strip-components 1
  share_gpu
  for spec in "$@"; do
    read -ra words <<< "$spec"
    name=${words[0]} lists=(data.train=[2007_train] data.test=2007_val)
    [[ $name == final* ]] && lists=(data.train=[2007_trainval] data.test=2007_test)
    timeout "$limit" python3 -c 'import sys; from resnet_train.cli import detect; sys.exit(detect())' data=voc \
      data.root="$WORK/bccd" recipe=short depth=18 device="${DEVICE:-cuda}" "${lists[@]}" run_dir="$WORK/runs/$name" \
      checkpoint_every=10000 "${words[@]:1}" > "$WORK/$name.log" 2>&1 &
  done
  wait
  [ -n "${CUDA_MPS_PIPE_DIRECTORY:-}" ] && echo quit | nvidia-cuda-mps-control && unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
  for spec in "$@"; do
    name=${spec%% *}
    say "$name: $(tail -c 2000 "$WORK/$name.log" | tr '\r' '\n' | grep -a mAP | tail -1 | cut -c1-220)"
  done
  for last in "$WORK"/runs/final*/checkpoints/last.pt; do
    [ -f "$last" ] || continue
    for words in "" refine=true "${SCALES:-}" "refine=true ${SCALES:-}"; do
      detector test "$last" $words 2>&1 | tail -1 | cut -c1-250
    done
  done
  if [ -d "$WORK/runs/final-1" ]; then
    detector test "checkpoint=[$WORK/runs/final-0/checkpoints/last.pt,$WORK/runs/final-1/checkpoints/last.pt]" refine=true 2>&1 | tail -1
  fi
  (cd "$WORK/runs" && tar -cf "$OUT/boxes.tar" --exclude=tensorboard --exclude='*.pt' $(for spec in "$@"; do echo "${spec%% *}"; done))
  say "boxes"
}

part_b() {
  local limit=$1 run name alive i images
  shift
  wait
  for ((i = 0; i < 60; i++)); do # the other half may still be being cut, by an earlier call that goes on under setsid
    images=$(find "$WORK/cifar10" -name '*.png' | wc -l)
    [ "$images" = "${IMAGES:-60000}" ] && break
    sleep 1
  done
  say "images: $images"
  [ "$images" = "${IMAGES:-60000}" ] || exit 9 # a part of them would be trained on as if it were all
  [ $# -gt 1 ] && share_gpu
  python3 -c "from resnet_train.data.source import load; print(load('cifar10', '$WORK/cifar10', 32).digest)"
  say "decoded"
  declare -gA PID=()
  for run in "$@"; do begin "$run"; done
  while [ $(($(date +%s) - T0)) -lt "$limit" ]; do
    sleep 2
    alive=0
    for name in "${!PID[@]}"; do
      if kill -0 "${PID[$name]}" 2> /dev/null; then
        alive=1
      else
        say "$name: $(grep -a 'test error' "$WORK/$name.log" | tail -1 | cut -c1-200)"
        unset "PID[$name]"
      fi
    done
    [ $alive = 0 ] && break
  done
  for name in "${!PID[@]}"; do kill -TERM "${PID[$name]}" 2> /dev/null; done
  wait
  [ -n "${CUDA_MPS_PIPE_DIRECTORY:-}" ] && echo quit | nvidia-cuda-mps-control
  for run in "$@"; do
    name=${run//[,=]/-}
    pack "$name"
    tail -c 20000 "$WORK/$name.log" >> "$OUT/logs.txt"
    say "$name: $(tail -c 400 "$WORK/$name.log" | tr '\r' '\n' | tail -1 | cut -c1-200)"
  done
}

case ${1:-} in
  prepare) prepare "${2:-}" ;;
  unpack) install && gpu_tests && wait ;;
  photographs) install && photographs "${@:2}" ;;
  A) install && part_a ;;
  bench) install && bench ;;
  boxes) install && boxes "${@:2}" ;;
  B) install && part_b "${@:2}" ;;
  *) sed -n 2,9p "$0" && exit 2 ;;
esac
