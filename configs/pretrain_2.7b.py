# torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=node0:29500 pretrain.py configs/pretrain_2.7b.py
# The compacted 2.7B, continued: the published recipe, with this size's own reference losses.
# 256 sequences x 4096 tokens = 1.05 M tokens a step; x 48,000 steps = 50 B tokens.  16 GPUs x 16 micro-steps x 1 sequence.
init_from = "out/2.7b_compact"
data_dir = "data/redpajama"
out_dir = "out/pretrain_2.7b"
split = "train"

domain_weights = "out/2.7b_compact/domain_weights.json"  # the mixture that pruning ended with
reference_loss = {"cc": 1.8712, "github": 0.6883, "book": 2.0325, "stackexchange": 1.5353,
    "wiki": 1.6297, "arxiv": 1.3560, "c4-rp": 2.0328}  # nats a token: the scaling law's at 2.7B
excess = "signed"  # as released; "clipped", the default, is the paper's

seq_len = 4096
global_batch_size = 256
micro_batch_size = 1  # published: 16; 60 GB a GPU by --plan=16
max_steps = 48000
learning_rate = 1e-4
warmup_steps = 1440
eval_interval = 400
eval_sequences = 500
save_interval = 3200
checkpointing = "selective"
