# python prune.py configs/demo_prune.py
# Before it: python -m tools.importance configs/demo_prune.py --out_dir=out/demo/activation --calibration_sequences=64
# The demo's source (192, 6 layers, 6 heads in 3 groups, 512) -> (128, 4 layers, 4 heads in 2 groups, 320), by masks alone:
# the source's weights stay as they are.  4 sequences x 128 tokens = 512 tokens a step; x 20 steps = 10,240 tokens.
# The released recipe, which trains weights under sampled masks: --relaxation=sample --init_scores= --freeze_weights=False
# --mask_learning_rate=1.0 --global_batch_size=16 --micro_batch_size=8 --max_steps=200 --learning_rate=2e-3 --warmup_steps=20
# --lagrangian_warmup_steps=80 --eval_interval=50
init_from = "out/demo/source/step_0000400"
data_dir = "out/demo/data"
out_dir = "out/demo/prune"
split = "prune"

target_hidden_size = 128
target_n_layers = 4
target_n_heads = 4
target_n_kv_heads = 2
target_intermediate_size = 320

relaxation = "topk"
init_scores = "out/demo/activation"
freeze_weights = True
mask_learning_rate = 0.2
seq_len = 128
global_batch_size = 4
micro_batch_size = 4
max_steps = 20
warmup_steps = 0
lagrangian_warmup_steps = 8
eval_interval = 10
eval_sequences = 32
save_interval = 20
