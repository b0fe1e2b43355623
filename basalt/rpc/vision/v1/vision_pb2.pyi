from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Cached(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CACHED_UNSPECIFIED: _ClassVar[Cached]
    CACHED_NOTHING: _ClassVar[Cached]
    CACHED_FEATURES: _ClassVar[Cached]
    CACHED_EMBEDDINGS: _ClassVar[Cached]
CACHED_UNSPECIFIED: Cached
CACHED_NOTHING: Cached
CACHED_FEATURES: Cached
CACHED_EMBEDDINGS: Cached

class EmbedRequest(_message.Message):
    __slots__ = ("assistant", "image_bytes", "object_key", "by_reference")
    ASSISTANT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    OBJECT_KEY_FIELD_NUMBER: _ClassVar[int]
    BY_REFERENCE_FIELD_NUMBER: _ClassVar[int]
    assistant: str
    image_bytes: bytes
    object_key: str
    by_reference: bool
    def __init__(self, assistant: _Optional[str] = ..., image_bytes: _Optional[bytes] = ..., object_key: _Optional[str] = ..., by_reference: _Optional[bool] = ...) -> None: ...

class EmbedResponse(_message.Message):
    __slots__ = ("data", "shape", "dtype", "digest", "image_id", "cached")
    DATA_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    digest: str
    image_id: str
    cached: Cached
    def __init__(self, data: _Optional[bytes] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., digest: _Optional[str] = ..., image_id: _Optional[str] = ..., cached: _Optional[_Union[Cached, str]] = ...) -> None: ...

class ListAssistantsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAssistantsResponse(_message.Message):
    __slots__ = ("assistants",)
    ASSISTANTS_FIELD_NUMBER: _ClassVar[int]
    assistants: _containers.RepeatedCompositeFieldContainer[AssistantInfo]
    def __init__(self, assistants: _Optional[_Iterable[_Union[AssistantInfo, _Mapping]]] = ...) -> None: ...

class AssistantInfo(_message.Message):
    __slots__ = ("name", "version", "tokens", "lm_dim")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LM_DIM_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    tokens: int
    lm_dim: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., tokens: _Optional[int] = ..., lm_dim: _Optional[int] = ...) -> None: ...
