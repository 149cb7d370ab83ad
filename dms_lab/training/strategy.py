"""Lightning's part of several processes: who they are, and weights that are cut over them (FSDP2).

    World -> trainer_arguments -> L.Trainer(...)     ddp: whole weights everywhere, gradients averaged
                                                     fsdp: `shard` cuts them; `Sharded` saves and loads them whole

Checkpoints are the same whatever wrote them: whole tensors of what is trained, so a run can go on with another strategy
and with another number of processes.
"""

from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from dms_lab.config import TrainConfig
from dms_lab.sharding import cut_like, gathered, piece
from dms_lab.structure import decoder_layers
from dms_lab.training.distributed import World, gpu_index
from dms_lab.training.last_checkpoint import StraightFile
from dms_lab.training.module import RetrofitModule


def trainer_arguments(config: TrainConfig, world: World) -> dict[str, Any]:
    """What `L.Trainer` must be told of devices, processes and strategy; it looks for none of them itself."""
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    if world.size == 1:  # in a job of Slurm too, where Lightning would requeue the job by its own signal handlers
        return {"accelerator": accelerator, "devices": 1, "plugins": [LightningEnvironment(), StraightFile()]}
    strategy = (
        Sharded(world.size)
        if config.strategy == "fsdp"
        # The adapter's weights are not used in the stage in which the neuron fades.
        else DDPStrategy(find_unused_parameters=config.neuron_zeroing_steps > 0)
    )
    device = torch.device("cuda", gpu_index(world)) if accelerator == "gpu" else torch.device("cpu")
    strategy.parallel_devices = [device] * world.devices  # asked by `local_rank`, this process's alone
    strategy.cluster_environment = Launched(world)
    strategy.checkpoint_io = StraightFile()
    return {"accelerator": accelerator, "devices": "auto", "num_nodes": world.num_nodes, "strategy": strategy}


class Launched(ClusterEnvironment):
    """Tells Lightning what `World` says. The process group stands already, and nothing is started."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    creates_processes_externally = True
    main_address, main_port = "", 0  # where they met: nobody asks any more

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.world.size

    def global_rank(self) -> int:
        return self.world.rank

    def local_rank(self) -> int:
        return self.world.local_rank

    def node_rank(self) -> int:
        return self.world.node_rank

    def set_world_size(self, size: int) -> None:
        pass

    def set_global_rank(self, rank: int) -> None:
        pass


# -- weights cut over the processes ----------------------------------------------------------------------------------
def make_mesh(world: World) -> DeviceMesh:
    """All processes of the run in a row."""
    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world.size,))


def shard(module: RetrofitModule, mesh: DeviceMesh) -> None:
    """Cuts the weights of student and teacher, frozen ones too, over the processes and moves them to their devices.

    A decoder layer's weights are whole while it runs, forward and backward. All others (embeddings, output head, final
    norm) are whole from the beginning of `loss` to the end of its backward, because the loss applies the head outside any
    model's forward. So `module.loss` must be called, not its parts.
    """
    for teacher in module.teacher_handles:
        module.add_module("teacher", teacher.model)  # one root for both models
    for model in (module.model, *(teacher.model for teacher in module.teacher_handles)):
        for layer in decoder_layers(model.get_decoder()):
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(module, "loss")


class Sharded(ModelParallelStrategy):
    """FSDP2. Weights that are frozen are never saved; those that are trained, and their moments, are saved whole.

    The first process holds all that is saved in its memory at once; what is loaded, each holds its own part of alone.
    """

    lightning_restore_optimizer = True

    def __init__(self, size: int) -> None:
        super().__init__(data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return gathered({f"model.{name}": parameter for name, parameter in self.lightning_module.trained.items()})

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, *args, **kwargs)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        for name, parameter in self.lightning_module.trained.items():
            piece(parameter).copy_(piece(cut_like(checkpoint["state_dict"][f"model.{name}"], parameter)))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return state | {"state": {index: gathered(moments) for index, moments in state["state"].items()}}

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            cut = {}
            for index, moments in state["state"].items():  # beside the moments there is the number of steps, a scalar
                like = parameters[index]
                cut[index] = {k: cut_like(v, like) if v.shape == like.shape else v for k, v in moments.items()}
            optimizer.load_state_dict(state | {"state": cut})


def build_trainer(config: TrainConfig, world: World, callbacks: list[L.Callback]) -> L.Trainer:
    """The trainer of a run; each process does its share of a step's micro-batches."""
    return L.Trainer(
        max_steps=config.steps,
        accumulate_grad_batches=config.accumulate // world.size,
        gradient_clip_val=config.clip,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **trainer_arguments(config, world),
    )
