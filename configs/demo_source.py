# python pretrain.py configs/demo_source.py
# A small source model with grouped heads, from fresh weights: what the demo prunes.  Equal shares of five domains.
# 16 sequences x 128 tokens = 2048 tokens a step; x 400 steps = 0.8 M tokens.
data_dir = "out/demo/data"
out_dir = "out/demo/source"
split = "train"

shape = {"vocab_size": 2048, "hidden_size": 192, "n_layers": 6, "n_heads": 6, "n_kv_heads": 3, "head_dim": 32,
         "intermediate_size": 512, "context_length": 256, "tie_embeddings": True}
update = "constant"

seq_len = 128
global_batch_size = 16
micro_batch_size = 16
max_steps = 400
learning_rate = 4e-3
warmup_steps = 40
eval_interval = 200
eval_sequences = 32
save_interval = 400
