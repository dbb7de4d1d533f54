# torchrun --nproc_per_node=8 prune.py configs/7b_to_2.7b.py
# Llama-2-7B (4096, 32 layers, 32 heads, 11008) -> 2.7B (2560, 32 layers, 20 heads, 6912), the published recipe.
# fp32 weights, gradients and AdamW take 16 bytes a parameter, 108 GB: sharded over 8 GPUs, 13.5 GB each.
# 32 sequences x 4096 tokens = 131,072 tokens a step; x 3200 steps = 0.42 B tokens.  8 GPUs x 2 micro-steps x 2 sequences.
init_from = "models/llama2-7b"
data_dir = "data/redpajama"
out_dir = "out/7b_to_2.7b"
split = "prune"

target_hidden_size = 2560
target_n_layers = 32
target_n_heads = 20
target_intermediate_size = 6912

domain_weights = {"cc": 0.67, "github": 0.045, "book": 0.045, "stackexchange": 0.02,
    "wiki": 0.045, "arxiv": 0.025, "c4-rp": 0.15}
reference_loss = {"cc": 1.8712, "github": 0.6883, "book": 2.0325, "stackexchange": 1.5353,
    "wiki": 1.6297, "arxiv": 1.3560, "c4-rp": 2.0328}  # nats a token: the scaling law's at 2.7B
excess = "signed"  # as released; "clipped", the default, is the paper's

seq_len = 4096
global_batch_size = 32
micro_batch_size = 2  # published: 4; so nothing dear is computed twice: 52 GB a GPU by --plan=8
max_steps = 3200
learning_rate = 1e-4
mask_learning_rate = 1.0
multiplier_learning_rate = 1.0
warmup_steps = 320
lagrangian_warmup_steps = 640
eval_interval = 50
eval_sequences = 500
eval_between = 50  # 0, the published setting: all 500 each time, which takes a third of the run
save_interval = 400  # published: 3200; a lost node must not cost the run
keep_last = 2
parallel = "fsdp"
checkpointing = "selective"
