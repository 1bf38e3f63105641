"""Verbs of users and roles: who there is, and who may do what where."""

from __future__ import annotations

from millrace.core.operations import Operation, Page, Request
from millrace.core.operations.live import NameRequest
from millrace.core.types import RoleBinding, Struct


class UserView(Struct, frozen=True, kw_only=True):
    """A user as others see them: without what they prove themselves with. `roles`: `role`, or `role:project`."""

    name: str
    email: str = ""
    is_service: bool = False
    has_password: bool = False
    has_totp: bool = False
    groups: tuple[str, ...] = ()
    external: str = ""
    roles: tuple[str, ...] = ()
    created_at: float = 0.0
    disabled_at: float | None = None


class UserCreate(Request, frozen=True, kw_only=True):
    """A new user, who may do nothing yet. Without a password they sign in elsewhere; a `service` account has none."""

    name: str
    email: str = ""
    service: bool = False
    password: str | None = None


class PasswordSet(NameRequest, frozen=True, kw_only=True):
    """A new password. `current` is wanted of who changes their own."""

    password: str
    current: str | None = None


class TotpSecret(Struct, frozen=True, kw_only=True):
    """A new secret for an app; nothing is changed until `user.enable_totp` has seen a code of it."""

    secret: str
    uri: str


class TotpEnable(NameRequest, frozen=True, kw_only=True):
    """A second factor: the secret and a code that was made with it. `password` is wanted of who changes their own."""

    secret: str
    code: str
    password: str | None = None


class TotpDisable(NameRequest, frozen=True, kw_only=True):
    """No second factor any more. `password` is wanted of who changes their own."""

    password: str | None = None


class WhoCan(Request, frozen=True, kw_only=True):
    """An operation such as `model.promote`, in a project; `*`: everywhere."""

    operation: str
    project: str = "default"


class Allowed(Struct, frozen=True, kw_only=True):
    """Somebody who may, and by which of their roles. `who` is `user:NAME`, `group:NAME` or `token:NAME`."""

    who: str
    roles: tuple[str, ...]
    is_service: bool = False


class RoleView(Struct, frozen=True, kw_only=True):
    """A role: patterns of operations; `reads` adds all that change nothing."""

    name: str
    description: str
    allow: tuple[str, ...]
    deny: tuple[str, ...]
    reads: bool = False
    is_built_in: bool = False


class RoleCreate(Request, frozen=True, kw_only=True):
    """A role of your own. `allow`, `deny`: patterns of operations such as `model.*`, with commas between; deny wins."""

    name: str
    allow: str = ""
    deny: str = ""
    description: str = ""


class GrantRequest(Request, frozen=True, kw_only=True):
    """`who`: a user's name, or `group:NAME` of the identity provider. `project`: `*` is everywhere."""

    who: str
    role: str
    project: str = "*"


class BindingList(Page, frozen=True, kw_only=True):
    """Who has been granted what; of one user or group."""

    who: str | None = None


LIST_USERS = Operation(
    name="user.list", summary="Users and service accounts, with their roles.", request=Page, response=list[UserView],
    method="GET", path="/users",
)  # fmt: skip
GET_USER = Operation(
    name="user.get", summary="A user.", request=NameRequest, response=UserView, method="GET", path="/users/{name}",
    subject_kind="user", subject_field="name", example={"name": "ada"},
)  # fmt: skip
CREATE_USER = Operation(
    name="user.create", summary="Make a user, or a service account; `roles grant` says what they may do.",
    request=UserCreate, response=UserView, method="POST", path="/users", is_write=True, subject_kind="user",
    subject_field="name", hidden_fields=("password",), example={"name": "ada", "email": "ada@example.org"},
)  # fmt: skip
SET_PASSWORD = Operation(
    name="user.set_password", summary="Give a user another password; their sessions end.", request=PasswordSet,
    response=UserView, method="POST", path="/users/{name}/password", is_write=True, subject_kind="user",
    subject_field="name", hidden_fields=("password", "current"),
    example={"name": "ada", "password": "blue tractor on mars"},
)  # fmt: skip
PREPARE_TOTP = Operation(
    name="user.prepare_totp", summary="A new secret for a second factor; nothing is changed yet.",
    request=NameRequest, response=TotpSecret, method="POST", path="/users/{name}/totp/prepare", subject_kind="user",
    subject_field="name", example={"name": "ada"},
)  # fmt: skip
ENABLE_TOTP = Operation(
    name="user.enable_totp", summary="Want a second factor of a user from now on.", request=TotpEnable,
    response=UserView, method="POST", path="/users/{name}/totp", is_write=True, subject_kind="user",
    subject_field="name", hidden_fields=("secret", "code", "password"),
    example={"name": "ada", "secret": "A" * 32, "code": "123456"},
)  # fmt: skip
DISABLE_TOTP = Operation(
    name="user.disable_totp", summary="Want no second factor of a user any more.", request=TotpDisable,
    response=UserView, method="POST", path="/users/{name}/totp/disable", is_write=True, subject_kind="user",
    subject_field="name", hidden_fields=("password",), example={"name": "ada"},
)  # fmt: skip
DISABLE_USER = Operation(
    name="user.disable", summary="Refuse a user from now on: passwords, sessions, tokens.", request=NameRequest,
    response=UserView, method="POST", path="/users/{name}/disable", is_write=True, subject_kind="user",
    subject_field="name", example={"name": "ada"},
)  # fmt: skip
ENABLE_USER = Operation(
    name="user.enable", summary="Let a disabled user in again.", request=NameRequest, response=UserView,
    method="POST", path="/users/{name}/enable", is_write=True, subject_kind="user", subject_field="name",
    example={"name": "ada"},
)  # fmt: skip
WHO_CAN = Operation(
    name="user.who_can", summary="Who may do an operation in a project, and by which role.", request=WhoCan,
    response=list[Allowed], method="GET", path="/who-can", subject_kind="project", subject_field="project",
    example={"operation": "model.promote", "project": "digits"},
)  # fmt: skip
LIST_ROLES = Operation(
    name="role.list", summary="Roles, built in and your own.", request=Page, response=list[RoleView], method="GET",
    path="/roles",
)  # fmt: skip
CREATE_ROLE = Operation(
    name="role.create", summary="Make a role of your own.", request=RoleCreate, response=RoleView, method="POST",
    path="/roles", is_write=True, subject_kind="role", subject_field="name",
    example={"name": "releaser", "allow": "model.promote,model.rollback"},
)  # fmt: skip
DELETE_ROLE = Operation(
    name="role.delete", summary="Delete a role of your own; whoever had it has it no more.", request=NameRequest,
    response=RoleView, method="POST", path="/roles/{name}/delete", is_write=True, subject_kind="role",
    subject_field="name", example={"name": "releaser"},
)  # fmt: skip
LIST_BINDINGS = Operation(
    name="role.bindings", summary="Who has been granted which role where.", request=BindingList,
    response=list[RoleBinding], method="GET", path="/role-bindings",
)  # fmt: skip
GRANT_ROLE = Operation(
    name="role.grant", summary="Give a role to a user or a group, in a project or everywhere.", request=GrantRequest,
    response=RoleBinding, method="POST", path="/role-bindings", is_write=True, subject_kind="user",
    subject_field="who", example={"who": "ada", "role": "developer", "project": "digits"},
)  # fmt: skip
REVOKE_ROLE = Operation(
    name="role.revoke", summary="Take a role away.", request=GrantRequest, response=RoleBinding, method="POST",
    path="/role-bindings/delete", is_write=True, subject_kind="user", subject_field="who",
    example={"who": "ada", "role": "developer", "project": "digits"},
)  # fmt: skip
OPERATIONS = (
    LIST_USERS, GET_USER, CREATE_USER, SET_PASSWORD, PREPARE_TOTP, ENABLE_TOTP, DISABLE_TOTP, DISABLE_USER,
    ENABLE_USER, WHO_CAN, LIST_ROLES, CREATE_ROLE, DELETE_ROLE, LIST_BINDINGS, GRANT_ROLE, REVOKE_ROLE,
)  # fmt: skip
