# torchrun --nproc_per_node=8 prune.py configs/pythia_410m_to_160m.py
# Pythia-410m (1024, 24 layers, 16 heads, 4096) -> the shape of Pythia-160m (768, 12 layers, 12 heads, 3072), as
# Sheared-Pythia-160m: on the Pile, 0.4 B tokens here and 50 B of continuation.  The source:
# python convert.py --from_hf=pythia-410m --out_dir=models/pythia-410m
# 64 sequences x 2048 tokens = 131,072 tokens a step; x 3200 steps = 0.42 B tokens.  8 GPUs x 8 sequences.
init_from = "models/pythia-410m"
data_dir = "data/pile"
out_dir = "out/pythia_410m_to_160m"
split = "prune"

target_hidden_size = 768  # 64 a head: GPT-NeoX has no other head_dim than hidden_size / n_heads
target_n_layers = 12
target_n_heads = 12
target_intermediate_size = 3072

seq_len = 2048  # Pythia's context
global_batch_size = 64
micro_batch_size = 8  # 20 GB a GPU by --plan=8
max_steps = 3200
learning_rate = 1e-4
mask_learning_rate = 1.0
multiplier_learning_rate = 1.0
warmup_steps = 320
lagrangian_warmup_steps = 640
eval_interval = 50
eval_sequences = 500
eval_between = 50
save_interval = 400
