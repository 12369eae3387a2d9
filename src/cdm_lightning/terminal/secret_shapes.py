"""Mask the secrets in a text that can be recognized without a secret key in front of them.

Access tokens are recognized by their shape, and passwords by their place in a URL or an HTTP header.
"""

import os
import re

MASK = "***"
LONGEST_PATH = 300  # characters to each side of a shape that are looked at to see whether a path exists

# A random text differs from words by its runs without separators: mixed capitals, small letters and digits, long hexadecimal numbers,
# and runs that are longer than words. The lengths 34, 36 and 48 are those of hf_, ghp_ and sk-.
MIXED = r"(?=[0-9a-z]*[A-Z])(?=[0-9A-Z]*[a-z])(?=[A-Za-z]*[0-9])"
RUN = rf"(?:{MIXED}[A-Za-z0-9]{{16,}}|[A-Za-z]{{24,}}(?![A-Za-z0-9])|(?=[a-f]*[0-9])[0-9a-f]{{32,}}|[A-Za-z0-9]{{34,}})"
REST = r"[\w-]*(?:\.[\w-]+)*=*"
SHAPES = re.compile(
    rf"""
    -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY(?:[ ]BLOCK)?-----.*?(?:-----END[ ][A-Z ]*PRIVATE[ ]KEY(?:[ ]BLOCK)?-----|\Z)
    | https://hooks\.slack(?:-gov)?\.com/(?:services|workflows|triggers)/[^\s"'<>]+
    | https://(?:\w+\.)?discord(?:app)?\.com/api/(?:v\d+/)?webhooks/[^\s"'<>]+
    | https://[\w.-]+\.webhook\.office\.com/[^\s"'<>]+ | https://hooks\.zapier\.com/hooks/[^\s"'<>]+
    | (?<![A-Za-z0-9])(?:
      (?:  # prefixes that a name of a folder may have too: a random run must follow, after at most three short words
        hf|api_org|gh[opusr]|github_pat|npm|gsk|nvapi|pplx|r8|figd|dckr_[op]at|shp[as][at]s?|[rps]k|whsec|gl[a-z]{{1,5}}t|glagent
        |xai|tvly|lin_api|lin_oauth|ntn|do[opr]_v1|sntry[su]|wandb_v1|pypi|rubygems|cfut|ya29|GOCSPX|jina|e2b|sbp|vck|fw|co
        |lsv2|glsa|glc|tgp_v1|ops|tskey|dapi|PMAK|dp
      )[-_.](?:[A-Za-z0-9]{{1,12}}[-_.]){{0,3}}{RUN}{REST}
      | (?:glpat|nvapi|figd|dckr_[op]at|GOCSPX|whsec|tgp_v1|github_pat|sk-proj|sk-ant|ya29)[-_.]  # no folder name begins so
      (?=[A-Za-z_.-]*[0-9])(?=[0-9a-z_.-]*[A-Z])[A-Za-z0-9_.-]{{20,}}
      | (?:hf|gh[opusr])_(?:(?=[A-Za-z]*[0-9])[A-Za-z0-9]{{20,}}|[A-Za-z0-9]{{34,36}})(?![A-Za-z0-9])  # a run without separators
      | dapi[0-9a-f]{{32}}(?:-\d+)? | (?:SK|AC)[0-9a-f]{{32}}
      | lsv2_(?:pt|sk)_[0-9a-f]{{32}}_[0-9a-f]{{10}} | glsa_[A-Za-z0-9]{{32}}_[0-9A-Fa-f]{{8}} | glc_[A-Za-z0-9+/]{{32,}}={{0,2}}
      | dp\.(?:st|pt|ct|sa|scim|audit)\.(?:[\w-]{{2,35}}\.)?[A-Za-z0-9]{{40,44}}
      | PMAK-[0-9a-f]{{24}}-[0-9a-f]{{34}} | [A-Za-z0-9]{{14}}\.atlasv1\.[A-Za-z0-9_=-]{{40,}}
      | tskey-[a-z]+-[A-Za-z0-9]{{8,}}(?:-[A-Za-z0-9]+)* | ops_eyJ[A-Za-z0-9_+/=-]{{16,}} | tgp_v1_[A-Za-z0-9_-]{{43}}
      | xox[a-z](?:\.xox[a-z])?-[A-Za-z0-9-]{{10,}} | xapp-[A-Za-z0-9-]{{10,}}
      | (?:AKIA|ASIA|AROA|AIDA|ABIA|ACCA|AGPA|ANPA)[A-Z0-9]{{16}}
      | AIza[A-Za-z0-9_-]{{30,}}
      | eyJ[A-Za-z0-9_=-]{{8,}}\.[A-Za-z0-9_=-]{{4,}}(?:\.[A-Za-z0-9_.+/=-]*)?
      | SG\.[A-Za-z0-9_-]{{16,}}\.[A-Za-z0-9_-]{{16,}}
      | hv[sbr]\.[A-Za-z0-9_-]{{16,}}
      | AGE-SECRET-KEY-1[A-Z0-9]{{20,}}
      | ATATT3[A-Za-z0-9_=-]{{16,}}
      | EAA[A-Za-z0-9]{{30,}}
      | \d{{8,10}}:[A-Za-z0-9_-]{{35}}
    )(?![A-Za-z0-9])
    """,
    re.VERBOSE | re.DOTALL,
)
IN_ADDRESS = re.compile(r"(?<=://)(?:[^\s/?#'\"]{1,500}|[^\s/@:'\"]{0,500}:(?!\d+/)[^\s@'\"]{1,500})(?=@)")
LOGIN = re.compile(r"(?<![\w/@:.-])[\w.+-]{1,100}:[^\s:/@'\"]{4,500}(?=@[\w-]+(?:\.[\w-]+|:\d))")
SCHEME = re.compile(
    r"\b(Bearer|Basic|Token|Negotiate|ApiKey)(\s+)(?=[^\s]*[0-9A-Z_.=/+-])[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE
)
PART = r"[\w-]+=(?:\\?\"[^\"\n]*\"|'[^'\n]*'|[^\s,;\"']+)"
PARTS = re.compile(  # the parts of a header that consists of NAME=VALUE
    rf"\b(Digest|AWS4-HMAC-SHA256|OAuth|Hawk|(?:Set-)?Cookie[\"']?[ ]?:)([ ]+[\"']?)(?!\*\*\*){PART}(?:[,;][ ]*{PART})*+",
    re.IGNORECASE,
)


def mask_shapes(text: str) -> str:
    """Return `text` with *** in place of access tokens, logins in addresses, and credentials in HTTP headers.

    Credentials in headers follow a word such as "Bearer", "Digest" or "Cookie:". The path of a file or folder that
    exists is not masked, even if it has the shape of an access token.
    """
    text = SHAPES.sub(lambda found: found[0] if _is_path(found) else MASK, text)
    if "@" in text:
        text = LOGIN.sub(MASK, IN_ADDRESS.sub(lambda found: found[0] if found[0] == "git" else MASK, text))
    text = SCHEME.sub(rf"\1\2{MASK}", text)
    return PARTS.sub(rf"\1\2{MASK}", text)


def _is_path(found: re.Match[str]) -> bool:
    """Return whether the matched text is part of the path of an existing file or folder."""
    if "\n" in found[0] or "://" in found[0]:
        return False
    text, before, after = found.string, max(0, found.start() - LONGEST_PATH), found.end() + LONGEST_PATH
    begin = re.search(r"[^\s\"'`=,:;()\[\]{}<>]*\Z", text[before : found.start()])
    end = re.match(r"[^\s\"'`=,:;()\[\]{}<>]*", text[found.end() : after])
    path = f"{begin[0] if begin else ''}{found[0]}{end[0] if end else ''}"
    try:
        return any(os.path.lexists(os.path.expanduser(one)) for one in {path, path.rstrip(".!?")})
    except ValueError:
        return False
