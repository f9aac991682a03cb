"""Credentials for S3, by the chain that AWS tools share: variables, profiles, the role of a container or machine.

Does not know what they are for. pyarrow, which reads inputs, walks the same chain by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayskip.errors import first_line

if TYPE_CHECKING:
    from obstore.auth.boto3 import Boto3CredentialProvider


class NoCredentials(Exception):
    """The chain ends without credentials; the message says so, and what to do."""


def aws_credentials() -> Boto3CredentialProvider:
    """What gives keys to an S3 store, fresh ones when they expire. Raises NoCredentials."""
    from botocore.exceptions import BotoCoreError
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        return Boto3CredentialProvider()
    except ValueError as error:
        raise NoCredentials(
            "no AWS credentials here: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a profile "
            "of ~/.aws that has them"
        ) from error
    except BotoCoreError as error:
        raise NoCredentials(f"no AWS credentials here: {first_line(error)}") from error


def why_refused(url: str) -> str:
    """How the message ends when a store refuses a url: that there are no credentials; "" where there are."""
    if not url.startswith("s3://"):
        return ""
    try:
        aws_credentials()
    except NoCredentials as error:
        return f"; {error}"
    return ""
