"""Contact sheets: samples of a data set with media as the model gets them, as a PNG or an HTML page."""

from glowflow.data.sheets.cards import Card, Medium, Sheet
from glowflow.data.sheets.samples import SheetOptions, sheet_of
from glowflow.data.sheets.writing import check_sheet, write_sheet

__all__ = ["Card", "Medium", "Sheet", "SheetOptions", "check_sheet", "sheet_of", "write_sheet"]
