#!/bin/bash
# REINFORCE++-baseline with the KL in the loss, in the flat spelling.
set -x
KL=0.001
N=8
ray job submit --address="http://127.0.0.1:8265" \
   -- python3 -m openrlhf.cli.train_ppo_ray \
   --pretrain ${MODEL:-Qwen/Qwen2.5-1.5B} \
   --remote_rm_url reward_func.py \
   --advantage_estimator reinforce_baseline \
   --n_samples_per_prompt $N \
   --rollout_batch_size 128 \
   --train_batch_size 1024 \
   --max_epochs 1 \
   --init_kl_coef $KL \
   --use_kl_loss \
   --kl_estimator k2 \
   --gamma 1.0 \
   --normalize_reward \
   --eps_clip_low_high 0.2 0.28   # clip higher
