"""What tests and scripts share: tiny random pipelines, published configurations, small runs. Not in the wheel."""
