# python prune.py configs/small_prune.py
# A template for a source of your own.  Here the README's (256, 4 layers, 4 heads in 2 groups, 688) -> (192, 3, 2 in 1, 448).
# 16 sequences x 128 tokens = 2048 tokens a step; x 400 steps = 0.8 M tokens.
init_from = "out/source"  # a model folder, or a run's for its newest checkpoint
data_dir = "data"  # of prepare.py, with the source's tokenizer
out_dir = "out/prune"
split = "prune"

# The exact shape to end at; what is not named stays.  `python -m tools.shapes out/source --target_params=2.1e6` lists some.
target_hidden_size = 192
target_n_layers = 3
target_n_heads = 2  # both numbers of heads where they are grouped
target_n_kv_heads = 1
target_intermediate_size = 448

seq_len = 128  # at most the source's context
global_batch_size = 16
micro_batch_size = 8  # two masks a step: less noise in their gradients
max_steps = 400  # a tenth is warm-up, a fifth the ramp; the sparsities overshoot and settle by step 150: not many fewer
learning_rate = 2e-3  # of the weights, about what they were trained with: 1e-4 for a source of billions
eval_interval = 50
eval_sequences = 32
save_interval = 100
keep_last = 2
