# python pretrain.py configs/demo_continue.py
# The demo's compacted model, continued on new text, with the mixture that pruning ended with.
# 16 sequences x 128 tokens = 2048 tokens a step; x 300 steps = 0.6 M tokens.
init_from = "out/demo/compact"
data_dir = "out/demo/data"
out_dir = "out/demo/continue"
split = "train"
seed = 1  # another order than the source's

domain_weights = "out/demo/compact/domain_weights.json"
reference_loss = "out/demo/compact/reference_loss.json"  # the source's own

seq_len = 128
global_batch_size = 16
micro_batch_size = 16
max_steps = 300
learning_rate = 2e-3
warmup_steps = 20
eval_interval = 100
eval_sequences = 32
save_interval = 300
