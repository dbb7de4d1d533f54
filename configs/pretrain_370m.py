# torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=node0:29500 pretrain.py configs/pretrain_370m.py
# The compacted 370M, continued: the published recipe, with this size's own reference losses.
# 256 sequences x 4096 tokens = 1.05 M tokens a step; x 48,000 steps = 50 B tokens.  16 GPUs x 16 sequences.
init_from = "out/370m_compact"
data_dir = "data/redpajama"
out_dir = "out/pretrain_370m"
split = "train"

domain_weights = "out/370m_compact/domain_weights.json"  # the mixture that pruning ended with
reference_loss = {"cc": 2.1401, "github": 0.8694, "book": 2.3625, "stackexchange": 1.7791,
    "wiki": 2.0470, "arxiv": 1.6637, "c4-rp": 2.3139}  # nats a token: the scaling law's at 370M
excess = "signed"  # as released; "clipped", the default, is the paper's

seq_len = 4096
global_batch_size = 256
micro_batch_size = 16  # 61 GB a GPU by --plan=16
max_steps = 48000
learning_rate = 1e-4
warmup_steps = 1440
eval_interval = 400
eval_sequences = 500
save_interval = 3200
checkpointing = "selective"
