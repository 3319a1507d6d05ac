"""A progress bar on stderr where tqdm is installed, else silence; the table goes to stdout above it."""


class Progress:
    """`tell` names what is being done, one step a call once `ready` has said how many there will be."""

    def __init__(self) -> None:
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            self.bar = None
            return
        # disable=None: no bar where stderr is not a terminal
        self.bar = tqdm(disable=None, bar_format="{l_bar}{bar:24}{r_bar}", dynamic_ncols=True)

    def ready(self, steps: int) -> None:
        if self.bar is not None:
            self.bar.reset(total=steps)

    def tell(self, what: str) -> None:
        if self.bar is not None:
            self.bar.set_description_str(f"{what:<50}", refresh=False)
            self.bar.update()

    def print(self, text: str) -> None:
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
