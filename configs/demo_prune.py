# python prune.py configs/demo_prune.py
# The demo's source (192, 6 layers, 6 heads in 3 groups, 512) -> (128, 4 layers, 4 heads in 2 groups, 320).
# 16 sequences x 128 tokens = 2048 tokens a step; x 200 steps = 0.4 M tokens.
init_from = "out/demo/source/step_0000400"
data_dir = "out/demo/data"
out_dir = "out/demo/prune"
split = "prune"

target_hidden_size = 128
target_n_layers = 4
target_n_heads = 4
target_n_kv_heads = 2
target_intermediate_size = 320

seq_len = 128
global_batch_size = 16
micro_batch_size = 8  # two masks a step: less noise in their gradients
max_steps = 200
learning_rate = 2e-3
warmup_steps = 20
lagrangian_warmup_steps = 80
eval_interval = 50
eval_sequences = 32
save_interval = 200
