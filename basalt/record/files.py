"""Files that clients uploaded: what they are called and where their bytes lie."""

from sqlalchemy import BigInteger, literal, select, tuple_
from sqlalchemy.orm import Mapped, Session, mapped_column

from basalt.record.clock import now
from basalt.record.database import Base


class NoSuchFile(Exception):
    """There is no file of this id."""


class File(Base):
    """An uploaded file. Its bytes are in the object store, under the digest of their content."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(default="")  # an API key's id; empty where none was needed, and the trainer's
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str]  # sha256:…
    created_at: Mapped[float] = mapped_column(default=now())
    deleted_at: Mapped[float | None]

    @property
    def key(self) -> str:
        """Of the object store."""
        return f"files/{self.digest.replace(':', '/')}"


def get_file(session: Session, file_id: str, owner: str = "") -> File:
    """
    Raises:
        NoSuchFile: the owner has none of this id, or it was deleted.
    """
    file = session.get(File, file_id)
    if file is None or file.owner != owner or file.deleted_at is not None:
        raise NoSuchFile(f"there is no file {file_id!r}: upload it to /v1/files first")
    return file


def accepted_file(session: Session, file_id: str) -> File:
    """One that a job named when it was accepted: deleted since or not, the job may need it.

    Raises:
        NoSuchFile: there never was one of this id.
    """
    file = session.get(File, file_id)
    if file is None:
        raise NoSuchFile(f"there is no file {file_id!r}")
    return file


def list_files(
    session: Session,
    owner: str = "",
    *,
    purpose: str | None,
    after: str | None,
    limit: int,
    newest_first: bool = True,
) -> list[File]:
    """A page of an owner's; `after` is the id of the last one of the page before."""
    order = (File.created_at, File.id)
    wanted = select(File).where(File.owner == owner, File.deleted_at.is_(None))
    wanted = wanted.order_by(*(column.desc() if newest_first else column.asc() for column in order))
    if purpose is not None:
        wanted = wanted.where(File.purpose == purpose)
    if after is not None:
        last = get_file(session, after, owner)
        beyond, place = tuple_(*order), tuple_(literal(last.created_at), literal(last.id))
        wanted = wanted.where(beyond < place if newest_first else beyond > place)
    return list(session.scalars(wanted.limit(limit)))
