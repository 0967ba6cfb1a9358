"""The functional layer: a loss is linearized at one point, then curvature is applied to tangents.

    lin = linearize(spec, params, x, y)     loss L, gradient, residuals kept for what follows
    hvp(lin, V) = H V                       H = d2 L / d params2, (P, P), never formed
    ggnvp(lin, V) = G V                     G = J' (d2 L / d outputs2) J
    quadratic_form(lin, V) = v_k' H v_k     half the work of H V
    hvp_vjp(lin, V, U) = d sum_k u_k' H v_k / d params
    penalty(lin, V) = mean_k ||H v_k||^2    with the loss and one gradient of both; also tr H^2

V, U are one direction (P,) or K directions as columns (P, K). With parameters (M, P) all this is
done for M models of one network at once (``many_models.py``): V, U are (M, P) or (M, P, K), and
results have M in front. These functions are not recorded by autograd and return detached results;
the differentiable forms are ``hessian_penalty`` and the operators in ``torch.ops.hvpfast``.
"""
