"""The interactive form of `refmamba step`: one element on the screen, keys to its neighbours (extra `teach`)."""

from prompt_toolkit.application import Application
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout import Layout, Window
from prompt_toolkit.layout.controls import FormattedTextControl

from refmamba.teach.follow import Follower, as_text

HELP = "← → operation   ↑ ↓ layer   [ ] token   , . channel   q end"


class Walk:
    """Where one is in a forward. A move that would leave it stays at its edge."""

    def __init__(self, follower: Follower, site: str, token: int, channel: int) -> None:
        self.follower, self.site, self.token, self.channel = follower, site, token, channel

    def operation(self, by: int) -> None:
        """To another operation."""
        sites = self.follower.sites
        self.site = sites[min(len(sites) - 1, max(0, sites.index(self.site) + by))]

    def layer(self, by: int) -> None:
        """To the same operation of another layer; nowhere from what belongs to no layer."""
        if self.site.startswith("layers."):
            _, layer, name = self.site.split(".", 2)
            other = f"layers.{int(layer) + by}.{name}"
            self.site = other if other in self.follower.sites else self.site

    def text(self) -> str:
        """What stands on the screen."""
        rows, columns = self.follower.shape(self.site)
        self.token, self.channel = min(rows - 1, max(0, self.token)), min(columns - 1, max(0, self.channel))
        sites = self.follower.sites
        element = self.follower.at(self.site, self.token, self.channel)
        return f"{HELP}\n\n{as_text(element, sites.index(self.site) + 1, len(sites))}"


def walk(start: Walk) -> None:
    """Run it until q is pressed."""
    keys = KeyBindings()

    @keys.add("left")
    @keys.add("right")
    def _(event: KeyPressEvent) -> None:
        start.operation(-1 if event.key_sequence[0].key == "left" else 1)

    @keys.add("up")
    @keys.add("down")
    def _(event: KeyPressEvent) -> None:
        start.layer(-1 if event.key_sequence[0].key == "up" else 1)

    @keys.add("[")
    @keys.add("]")
    def _(event: KeyPressEvent) -> None:
        start.token += -1 if event.data == "[" else 1

    @keys.add(",")
    @keys.add(".")
    def _(event: KeyPressEvent) -> None:
        start.channel += -1 if event.data == "," else 1

    @keys.add("q")
    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        event.app.exit()

    window = Window(FormattedTextControl(start.text), wrap_lines=True)
    Application[None](Layout(window), key_bindings=keys, full_screen=True).run()
