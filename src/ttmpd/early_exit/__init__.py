"""Answer sooner: samples that are sure early leave a model early. One file per method."""
