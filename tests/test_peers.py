"""The tests against other people's code: TRL's GRPOTrainer."""
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

import grpo


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_objectives_equal_trls(name):
    """The loss and the gradient of each objective equal those of TRL's GRPOTrainer on the same
    tensors."""
    torch.manual_seed(0)
    new = (torch.randn(6, 9) * 0.3 - 2).requires_grad_()
    old, reference = (new.detach() + torch.randn(6, 9) * 0.3 for _ in range(2))
    advantage, lengths = torch.randn(6), torch.tensor([9, 1, 4, 7, 2, 9])
    mask = (torch.arange(9) < lengths.unsqueeze(1)).float()
    s = grpo.RL(objective=name, max_new_tokens=11, clip_low=0.1, clip_high=0.15, beta=0.04)
    J, _ = grpo.OBJECTIVES[name](new, old, reference, advantage, mask, grpo.Batch(6, 32), s)
    ours = -J

    from trl import GRPOTrainer  # imported here, since it takes seconds
    trainer = MagicMock(
        beta=s.beta, epsilon_low=s.clip_low, epsilon_high=s.clip_high, loss_type=name,
        importance_sampling_level="token", top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        use_vllm=False, aux_loss_enabled=False, _entropy_bonus_enabled=False,
        max_completion_length=s.max_new_tokens, current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1))
    if name == "gspo":
        trainer.loss_type, trainer.importance_sampling_level = "grpo", "sequence"
    trainer._get_per_token_logps_and_entropies.return_value = (new, torch.zeros(6, 9), None)
    theirs = GRPOTrainer._compute_loss(trainer, None, {
        "prompt_ids": torch.zeros(6, 1), "prompt_mask": torch.ones(6, 1), "advantages": advantage,
        "completion_ids": torch.zeros(6, 9), "completion_mask": mask, "old_per_token_logps": old,
        "ref_per_token_logps": reference, "num_items_in_batch": mask.sum()})
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    gradients = [torch.autograd.grad(loss, new, retain_graph=True)[0] for loss in (ours, theirs)]
    assert torch.allclose(*gradients, atol=1e-7)
