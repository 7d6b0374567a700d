"""A product by whichever way the number of its rows makes faster, shared by all threads."""

from refmamba.backends.cpu.kernels.codes import by_panels
from refmamba.backends.cpu.kernels.digits import ROWS_OF_SPREAD, ROWS_OF_TILE, product_item, spreads
from refmamba.backends.cpu.kernels.output import SET, requantize_rows
from refmamba.backends.cpu.kernels.panels import ROWS_OF_PANEL, panel_item
from refmamba.backends.cpu.kernels.regions import meet, share
from refmamba.backends.cpu.kernels.tables import FLOATS, Mode, Run, Site, at, kernel

PRODUCT_REGIONS = 1  # of `product`


@kernel()
def product(rank, run, site, rows, out, strip_bytes, row_bytes, limit, residual, counter):
    """Region: a product, one or two strips and some rows an item. Returns the next region's counter."""
    panels = by_panels(site, rows)
    pieces, height = (2 * at(site, Site.PAIRS), ROWS_OF_PANEL) if panels else (at(site, Site.PAIRS), ROWS_OF_TILE)
    if spreads(site, rows) and not panels:
        height = ROWS_OF_SPREAD
    items, mine = pieces * ((rows + height - 1) // height), 0
    first, last = share(run, counter, items)
    while first < items:
        for i in range(first, last):
            row = i // pieces * height
            end = min(rows, row + height)
            if panels:
                panel_item(rank, run, site, i % pieces, row, end, out, strip_bytes, row_bytes, limit, residual)
            else:
                product_item(rank, run, site, i % pieces, row, end, out, strip_bytes, row_bytes, limit, residual)
        mine += last - first
        first, last = share(run, counter, items)
    return meet(counter, items, mine)


@kernel()
def linear(rank, run, site, out, counter):
    """Regions: a linear layer from its codes to its `out` side, in strips. Returns the next region's counter."""
    step = at(run, Run.STRIDE) * FLOATS
    counter = product(rank, run, site, at(run, Run.ROWS), out, step, FLOATS, SET, SET, counter)
    if at(site, Site.OUT) != Mode.NONE:
        counter = requantize_rows(run, site, out, out, SET, counter)
    return counter
