"""Other packages' names and argument orders over this library's operators and algorithms.

    hvpfast.compat.curvlinops          constructors, hutchinson_trace, xtrace, ..., spectra
    hvpfast.compat.pyhessian           hessian(model, criterion, ...): .eigenvalues .trace .density
    hvpfast.compat.eigenthings         HessianOperator(model, dataloader, loss_fn), lanczos, ...
    hvpfast.compat.pytorch_optimizer   the diagonal for step(hessian=[...])
    hvpfast.compat.laplace             curvature backends for laplace-torch (needs that package)

Each module's docstring says where its results differ on purpose. docs/migration.md shows the calls
side by side. Modules are imported by name, for instance ``from hvpfast.compat import curvlinops``.
"""
