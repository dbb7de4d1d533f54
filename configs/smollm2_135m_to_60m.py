# torchrun --nproc_per_node=8 prune.py configs/smollm2_135m_to_60m.py
# SmolLM2-135M (576, 30 layers, 9 heads in 3 groups, 1536; tied) -> 60 M (384, 26 layers, 6 heads in 2 groups, 1024).
# 128 sequences x 2048 tokens = 262,144 tokens a step; x 1600 steps = 0.42 B tokens.  8 GPUs x 16 sequences.
# On a CPU, to see it move: --global_batch_size=2 --micro_batch_size=2 --seq_len=64 --max_steps=20 --eval_sequences=2
# --warmup_steps=2 --lagrangian_warmup_steps=10
init_from = "models/smollm2-135m"
data_dir = "data/smollm2"
out_dir = "out/smollm2_135m_to_60m"
split = "prune"

target_hidden_size = 384
target_n_layers = 26
target_n_heads = 6
target_n_kv_heads = 2
target_intermediate_size = 1024

seq_len = 2048
global_batch_size = 128
micro_batch_size = 16
max_steps = 1600
learning_rate = 2e-4
warmup_steps = 160
lagrangian_warmup_steps = 320
eval_interval = 50
eval_sequences = 100
save_interval = 400
