"""Commands about records: `kvkernels inspect`, `kvkernels verify` and `kvkernels key`."""
