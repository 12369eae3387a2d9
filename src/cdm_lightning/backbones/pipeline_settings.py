"""The options of a pipeline's backbone, and the contents of the pipeline's configuration files. No weights are loaded here."""

import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.backbones.lora_file import locate_lora
from cdm_lightning.backbones.pipeline_folder import codec_class, loading, locate_pipeline, require_buildable
from cdm_lightning.backbones.plain_scheduler import OF_TRAINING, of_training, require_known_shift
from cdm_lightning.backbones.settings_file import read_settings
from cdm_lightning.backbones.whole_folder import constructor_defaults, require_numbers, require_sizes, sizes_in
from cdm_lightning.errors import UserError
from cdm_lightning.kinds import DtypeName, FileOrFolder, Model, Pixels, Revision, Scale, Tokens

SCHEDULER_NUMBERS = (
    "num_train_timesteps",
    "shift",
    "flow_shift",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "shift_terminal",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class shared_property:
    """A property that is computed once for a backbone and all its copies made by `PipelineSettings.at`."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make, self.__doc__ = make, make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, backbone: Any, owner: type | None = None) -> Any:
        if backbone is None:
            return self
        if self.name not in backbone.shared:
            backbone.shared[self.name] = self.make(backbone)
        return backbone.shared[self.name]

    def __set__(self, backbone: Any, value: Any) -> None:
        backbone.shared[self.name] = value


@dataclass(eq=False)
class PipelineSettings(Backbone):
    """The options of a pipeline's backbone, and the contents of the pipeline's configuration files.

    `pretrained` is a pipeline folder or a hub id (at `revision`). `height` and `width` are in pixels (default: the
    pipeline's own). `max_sequence_length` is the number of text tokens (default: the pipeline's own). `teacher_dtype`
    is the dtype of the frozen teacher, and `text_dtype` that of the text encoders. Trained networks and the VAE are
    float32. `teacher_lora` is a LoRA's safetensors file, or its folder. The LoRA is fused into the pretrained network
    with the scale `teacher_lora_scale`. Teacher, student and fake score start from the fused network. Raises
    `UserError` for an argument out of its range, and for a LoRA file that is missing or not a .safetensors file.
    """

    title: ClassVar[str]  # the family's name in messages and, in lower case, at the start of fingerprints
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    transformer_class: ClassVar[type[ModelMixin]]
    parts: ClassVar[tuple[str, ...]]  # the parts of a complete pipeline folder
    text_tokens: ClassVar[range] = range(1, 513)  # the allowed numbers of text tokens
    shift_options: ClassVar[tuple[str, ...]] = ("use_dynamic_shifting",)  # allowed in addition to a static shift

    pretrained: Model
    revision: Revision | None = None
    height: Pixels | None = None
    width: Pixels | None = None
    max_sequence_length: Tokens | None = None
    teacher_dtype: DtypeName = "float32"
    text_dtype: DtypeName = "float32"
    teacher_lora: FileOrFolder | None = None
    teacher_lora_scale: Scale = 1.0
    shared: dict[str, Any] = field(default_factory=dict, init=False)  # shared by all image sizes; see `shared_property`

    def __post_init__(self) -> None:
        if self.max_sequence_length is None:
            self.max_sequence_length = self.default_text_length()
        if (length := self.max_sequence_length) not in self.text_tokens:
            allowed = " to ".join(str(end) for end in sorted({self.text_tokens.start, self.text_tokens.stop - 1}))
            raise UserError(f"backbone.max_sequence_length={length} must be {allowed} tokens for {self.title}")
        for name in ("teacher_dtype", "text_dtype"):
            if getattr(self, name) not in DTYPES:
                raise UserError(f"backbone.{name}={getattr(self, name)!r} must be one of {', '.join(DTYPES)}")
        self.pretrained = str(self.pretrained)
        self.teacher_lora = None if self.teacher_lora is None else locate_lora(self.teacher_lora)

    def at(self, height: int | None = None, width: int | None = None) -> Self:
        """Return a copy of this backbone for images of another size in pixels.

        The copy and this backbone share all loaded parts, such as the codec. A side that is None stays the same. Raises
        `UserError` if the pipeline cannot make images of this size.
        """
        view = copy.copy(self)
        view.height = self.height if height is None else height
        view.width = self.width if width is None else width
        _ = view.image_size
        return view

    # ---- what the folder says

    @shared_property
    def folder(self) -> Path:
        """The pipeline's local folder. A hub id is downloaded first. Raises `UserError` for an unusable pipeline."""
        return locate_pipeline(self.pretrained, self.revision, self.pipeline_class, self.parts)

    @shared_property
    def network_config(self) -> dict[str, Any]:
        """The arguments of the transformer's constructor (config.json). Raises `UserError` if they cannot be used."""
        config, file = self._config("transformer"), self.folder / "transformer" / "config.json"
        require_buildable(self.transformer_class, config, file)
        require_sizes(sizes_in(config, self.transformer_class), file)
        self.network_config = config  # for the sizes that follow from it
        self._require_sizes(file, "latent_channels", "patch", "feature_width", "time_embedding_width")
        return config

    @shared_property
    def vae_config(self) -> dict[str, Any]:
        """The arguments of the image codec's constructor (config.json). Raises `UserError` if they cannot be used."""
        config, file = self._config("vae"), self.folder / "vae" / "config.json"
        require_buildable(codec_class(self.folder), config, file)
        require_numbers(config, ("scaling_factor", "shift_factor"), file)
        self.vae_config = config
        self._require_sizes(file, "vae_factor")
        return config

    @shared_property
    def tokenizer_config(self) -> dict[str, Any]:
        """The contents of tokenizer/tokenizer_config.json; {} if there is no such file."""
        file = self.folder / "tokenizer" / "tokenizer_config.json"
        config = read_settings(file) if file.is_file() else {}
        require_numbers(config, ("model_max_length",), file)
        return config

    def _require_sizes(self, file: Path, *names: str) -> None:
        with loading(file):
            sizes = {name: getattr(self, name) for name in names}
        require_sizes(sizes, file)

    @shared_property
    def has_weights(self) -> bool:
        """Whether networks are built with their weights. `leave_weights_out` makes this False."""
        return True

    def leave_weights_out(self, architecture: Mapping[str, Any] | None = None) -> None:
        """Build networks without weights, on the meta device, from now on. The planner needs only shapes and dtypes.

        Without `architecture`, this method reads the pipeline's configuration files and raises `UserError` if they
        cannot be used. If `architecture` is given, it replaces the files, and sigmas are not shifted. Its entry
        "transformer" holds the arguments of the transformer's constructor that differ from their defaults, and "vae"
        all arguments of the codec's constructor that the backbone uses. `teacher_lora` is always ignored, since it
        changes no shape.
        """
        self.has_weights = False
        if architecture is not None:
            self.network_config = constructor_defaults(self.transformer_class) | dict(architecture["transformer"])
            self.vae_config, self.tokenizer_config = dict(architecture["vae"]), {}
            self.scheduler = FlowMatchEulerDiscreteScheduler()
        _ = self.scheduler, self.tokenizer_config, self.latent_shape  # under `FakeTensorMode` numbers have no values

    def _config(self, part: str) -> dict[str, Any]:
        config = read_settings(self.folder / part / "config.json")
        return {key: value for key, value in config.items() if not key.startswith("_")}

    @shared_property
    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """The original pipeline's scheduler. Raises `UserError` if it has options that are not supported.

        Training uses its timestep shift. For an exported student, this scheduler is read from a subfolder listed in
        `OF_TRAINING` or, if there is none, made from the student's scheduler.
        """
        subfolder = next((name for name in OF_TRAINING if (self.folder / name).is_dir()), "scheduler")
        file = self.folder / subfolder / "scheduler_config.json"
        require_numbers(read_settings(file), SCHEDULER_NUMBERS, file)
        with loading(self.folder / subfolder):
            scheduler = self._load_scheduler(subfolder)
        config: Any = scheduler.config  # a FrozenDict, whose keys are attributes
        require_sizes({"num_train_timesteps": config.num_train_timesteps}, file)
        if not config.shift > 0:
            raise UserError(f"{file}: shift={config.shift} must be above 0; copy the pipeline again")
        require_known_shift(scheduler, self.pretrained, self.title, self.shift_options)
        return scheduler

    def _load_scheduler(self, subfolder: str) -> FlowMatchEulerDiscreteScheduler:
        if made := of_training(
            cast(dict[str, Any], FlowMatchEulerDiscreteScheduler.load_config(self.folder, subfolder=subfolder))
        ):
            return made
        loaded = FlowMatchEulerDiscreteScheduler.from_pretrained(self.folder, subfolder=subfolder)
        return cast(FlowMatchEulerDiscreteScheduler, loaded)

    @property
    def vae_factor(self) -> int:
        """The factor of the image codec: pixels per latent position along one side."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def patch(self) -> int:
        """The patch size of the transformer: latent positions per token along one side."""
        return 2

    @property
    def size_unit(self) -> int:
        """Both sides of an image must be multiples of this number of pixels."""
        return self.patch * self.vae_factor

    @property
    def native_side(self) -> int:
        """The default height and width of an image, in pixels."""
        return 128 * self.vae_factor  # `default_sample_size` of the pipelines that have one

    @property
    def largest_side(self) -> int | None:
        """The largest allowed side of an image, in pixels. None means that the network has no limit."""
        return None

    @property
    def image_size(self) -> tuple[int, int]:
        """The size (height, width) of an image, in pixels. Raises `UserError` for a side that does not fit the network."""
        unit, largest = self.size_unit, self.largest_side
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None and (side % unit or not 0 < side <= (largest or side)):
                limit = f" up to {largest}" if largest else ""
                raise UserError(f"{name}={side} does not fit {self.pretrained}; set a multiple of {unit}{limit}")
        return self.height or self.native_side, self.width or self.native_side

    @property
    def latent_channels(self) -> int:
        """C, the number of channels of a latent."""
        return self.network_config["in_channels"]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape (C, h, w) of a latent."""
        height, width = self.image_size
        return self.latent_channels, height // self.vae_factor, width // self.vae_factor

    @property
    def feature_width(self) -> int:
        """D, the width of the hidden states (B, N, D) after a block."""
        return self.network_config["num_attention_heads"] * self.network_config["attention_head_dim"]

    @property
    def time_embedding_width(self) -> int:
        """D, the width of the time embedding (B, D)."""
        return self.feature_width

    @property
    def fingerprint(self) -> str:
        """Family name and hash of the network's configuration. A run refuses a checkpoint with another fingerprint."""
        config = json.dumps(self.network_config, sort_keys=True)
        return f"{self.title.lower()}-{hashlib.blake2b(config.encode(), digest_size=8).hexdigest()}"

    @property
    def text_length(self) -> int:
        """The number of text tokens to which prompts are padded or cut: the value of `max_sequence_length`."""
        return cast(int, self.max_sequence_length)

    def call_sizes(self) -> dict[str, int]:
        """Return the arguments that a call of the pipeline needs for this backbone's image size and text length.

        "height" and "width" are included if this backbone's `height` or `width` is set. "max_sequence_length" is
        included if its value is not the pipeline's default.
        """
        is_default = self.max_sequence_length == self.default_text_length()
        sizes = {} if is_default else {"max_sequence_length": self.text_length}
        if (self.height, self.width) != (None, None):
            sizes["height"], sizes["width"] = self.image_size
        return sizes

    @classmethod
    def default_text_length(cls) -> int:
        """Return the pipeline's default number of text tokens. Without a default, return the largest allowed number."""
        length = cls.call_default("max_sequence_length")
        return cls.text_tokens.stop - 1 if length is None else length

    @classmethod
    def call_default(cls, argument: str) -> Any:
        """Return the default of an argument of the pipeline's call, or None if the call has no such argument."""
        parameter = inspect.signature(cls.pipeline_class.__call__).parameters.get(argument)
        return None if parameter is None else parameter.default

    @classmethod
    def settings_of(cls, call: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values that `call` sets for the backbone's arguments `height`, `width` and `max_sequence_length`.

        `call` holds the arguments for calling an exported student (see `student_folder.read_call`).
        """
        return {name: call[name] for name in ("height", "width", "max_sequence_length") if name in call}
