"""Two that want one served name: clients know names, so only one may have it.

Of two deployments that this operator serves, the one that has it keeps it, for clients may be using
it; of two that want it at the same time the older one gets it. What other operators serve (of
one namespace each, with one Redis) shows in the index alone, which knows no ages: whoever stands
there has the name, and a deployment that serves already tells that it shares it.
"""

from collections.abc import Collection, Iterable
from typing import Any

from tasuki_common.messages import Member
from tasuki_operator.store import Key, served_names
from tasuki_operator.troubles import Trouble

_ADVICE = "choose another spec.model.servedName (or alias), or delete one of the two."


def owner(rival: Key) -> Trouble:
    """What is said of a deployment that has the name."""
    text = f"Deployment {rival} has a name that this one wants; {_ADVICE}"
    return Trouble("NameTaken", text)


def stranger(
    key: Key, body: dict[str, Any], members: Iterable[Member], namespaces: Collection[str]
) -> Trouble | None:
    """A pod of another operator's with a name of the deployment `key`.

    `namespaces`: those that this operator serves, and where the deployments' ages decide; none:
    all.
    """
    wanted = set(served_names(body))
    for member in members if namespaces else ():
        namespace = member.pod.rpartition("/")[0]
        if namespace not in namespaces and wanted & {member.model, *member.aliases}:
            text = (
                f"Pod {member.pod}, which another operator looks after, serves a name that this "
                f"one wants; {_ADVICE}"
            )
            return Trouble("NameTaken", text)
    return None
