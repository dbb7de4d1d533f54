# torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=node0:29500 pretrain.py configs/pretrain_1.3b.py
# The compacted 1.3B, continued: the published recipe, with this size's own reference losses.
# 256 sequences x 4096 tokens = 1.05 M tokens a step; x 48,000 steps = 50 B tokens.  16 GPUs x 4 micro-steps x 4 sequences.
init_from = "out/1.3b_compact"
data_dir = "data/redpajama"
out_dir = "out/pretrain_1.3b"
split = "train"

domain_weights = {"cc": 0.2192, "github": 0.0002, "book": 0.0791, "stackexchange": 0.0064,
    "wiki": 0.0096, "arxiv": 0.001, "c4-rp": 0.6845}  # the mixture that the published pruning ended with
reference_loss = {"cc": 1.9643, "github": 0.7459, "book": 2.1393, "stackexchange": 1.6117,
    "wiki": 1.7590, "arxiv": 1.4449, "c4-rp": 2.1251}  # nats a token: the scaling law's at 1.3B
excess = "signed"  # as released; "clipped", the default, is the paper's

seq_len = 4096
global_batch_size = 256
micro_batch_size = 4  # published: 16; 51 GB a GPU by --plan=16
max_steps = 48000
learning_rate = 1e-4
warmup_steps = 1440
eval_interval = 400
eval_sequences = 500
save_interval = 3200
checkpointing = "selective"
