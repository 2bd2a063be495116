"""Files of examples: one reader for every format and for everybody who reads them."""
