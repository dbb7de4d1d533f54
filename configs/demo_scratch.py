# python pretrain.py configs/demo_scratch.py
# The demo's target shape from fresh weights, on as many tokens as pruning and continuing took together.
# 16 sequences x 128 tokens = 2048 tokens a step; x 500 steps = 1.0 M tokens.
data_dir = "out/demo/data"
out_dir = "out/demo/scratch"
split = "train"
seed = 1

shape = {"vocab_size": 2048, "hidden_size": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32,
         "intermediate_size": 320, "context_length": 256, "tie_embeddings": True}
update = "constant"

seq_len = 128
global_batch_size = 16
micro_batch_size = 16
max_steps = 500
learning_rate = 4e-3
warmup_steps = 40
eval_interval = 250
eval_sequences = 32
save_interval = 500
