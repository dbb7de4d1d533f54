#!/usr/bin/env bash
# bash configs/7b_to_1.3b.sh
# Raw text and Llama-2-7b-hf -> an exported 1.3B checkpoint.  Start it again after any interruption: a stage whose output is
# there is skipped, one that was cut off goes on.  On several nodes: the last training by its config's first line on each.
set -euo pipefail
RAW=${RAW:-raw/redpajama}  # one folder a domain: cc github book stackexchange wiki arxiv c4-rp
HF=${HF:-Llama-2-7b-hf}
GPUS=${GPUS:-8}

# text -> tokens; goes on by itself
python prepare.py --input_dir="$RAW" --out_dir=data/redpajama --tokenizer="$HF/tokenizer.model"

# Hugging Face -> ours
[ -f models/llama2-7b/model.safetensors ] || python convert.py --from_hf="$HF" --out_dir=models/llama2-7b

# masks and weights, 0.4 B tokens
[ -d out/7b_to_1.3b/step_0003200 ] || torchrun --nproc_per_node="$GPUS" prune.py configs/7b_to_1.3b.py --resume

# cut to exactly the target shape
[ -d out/1.3b_compact ] || python compact.py --checkpoint=out/7b_to_1.3b --out_dir=out/1.3b_compact

# train on, 50 B tokens
[ -d out/pretrain_1.3b/step_0048000 ] ||
    torchrun --nproc_per_node="$GPUS" pretrain.py configs/pretrain_1.3b.py --resume

# ours -> Hugging Face
[ -d export/1.3b ] || python convert.py --to_hf=out/pretrain_1.3b --out_dir=export/1.3b --dtype=bfloat16 --verify
